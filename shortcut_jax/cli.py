"""What the two binaries share: the flags, and errors as one sentence instead of a traceback."""

import importlib.machinery
import importlib.util
import logging as stdlib_logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from shortcut_jax import config as config_lib
from shortcut_jax import validation
from shortcut_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, e.g. configs/digits.py or configs/digits.py:small.",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(function: Callable[[], None]) -> None:
    """Parses the flags and calls `function`; a UserError or bad flag ends with status 2."""

    def guarded(_: Sequence[str]) -> None:
        try:
            function()
        except UserError as error:
            fail(str(error))

    logging.set_verbosity(logging.INFO)
    # Orbax reports a dozen lines per save through the same logger, and jax every missing back end.
    logging.get_absl_handler().addFilter(
        lambda record: (
            record.levelno > stdlib_logging.INFO
            or not re.search("orbax|xla_bridge", record.pathname)
        )
    )
    app.run(guarded, flags_parser=_parse)


def workdir() -> str:
    """--workdir.

    Raises:
      UserError: it is missing.
    """
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give the folder of the run, e.g. --workdir=runs/a.")
    return WORKDIR.value


def fail(sentence: str) -> NoReturn:
    """Prints one sentence and ends the process with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    values: dict[str, Any] = {}
    try:
        file = _config_argument(argv)
        if file is None:
            flags.FLAGS(argv, known_only=True)  # there may be a --help
            raise UserError("--config is missing; give a config file, e.g. configs/digits.py.")
        # ml_collections loads the file again; what it says of mistakes in it, and of unknown keys,
        # is unclear, and comes as many types of exceptions.
        values = config_lib.flatten(_load(file))
        _check_keys(flags.FLAGS.read_flags_from_files(argv), values)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value.")
        return rest
    except UserError as error:
        fail(str(error))
    except flags.Error as error:
        fail(_explain(str(error), values))


def _config_argument(argv: Sequence[str]) -> str | None:
    """FILE.py:ARG of --config=FILE.py:ARG; None if there is none."""
    only_config = flags.FlagValues()
    flags.DEFINE_multi_string("config", [], "", flag_values=only_config)
    only_config(argv, known_only=True)
    found = only_config.config
    if len(found) > 1:
        raise UserError(f"--config is given {len(found)} times ({', '.join(found)}); give it once.")
    return found[0] if found else None


def _load(argument: str) -> ConfigDict:
    """What get_config(ARG) of FILE.py:ARG returns; whatever goes wrong there is a UserError."""
    path, colon, arg = argument.partition(":")
    example = "a Python file with get_config(arg), such as configs/digits.py"
    if not Path(path).is_file():
        raise UserError(f"--config={argument}: there is no file {path!r}; give {example}.")
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None  # because a loader is given
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no function get_config; expected {example}: add one.")
        config = module.get_config(*([arg] if colon else []))
    except UserError:
        raise
    except Exception as error:  # the code is the user's own and may raise anything
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {frames[-1].lineno}" if frames else path
        raise UserError(
            f"{where}: {type(error).__name__}: {_text(error)}; "
            f"expected {example}: correct that file."
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {path} returns {config!r:.100}; expected a ConfigDict: return "
            "shortcut_jax.config.build(...), as configs/digits.py does."
        )
    return config


def _text(error: Exception) -> str:
    # ml_collections wraps a KeyError in an AttributeError; the text of both is a quoted repr.
    while error.args and isinstance(error, KeyError | AttributeError):
        if not isinstance(error.args[0], Exception):
            return " ".join(str(error.args[0]).split())
        error = error.args[0]
    return " ".join(str(error).split())


def _check_keys(argv: Sequence[str], known: Mapping[str, Any]) -> None:
    for argument in argv[1:]:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if override and override[1] not in known:
            raise UserError(f"--config.{validation.unknown_key(override[1], known)}")


def _explain(refused: str, values: Mapping[str, Any]) -> str:
    """The sentence for what absl refused; `values` are those of the config file."""
    wrong_value = re.match(r"flag --([\w.]+)=(.*?): ", refused, re.DOTALL)
    if wrong_value:
        name, found = wrong_value[1], repr(wrong_value[2])
        if name.startswith("config."):
            return f"--{validation.wrong_type(name, found, values[name.removeprefix('config.')])}"
        kind = flags.FLAGS[name].flag_type()
        return f"--{name}={found} is not of type {kind}; give such a value, --help explains it."
    return (
        f"{' '.join(refused.split()).rstrip(' ?.')}; flags are written --name=value, --config=FILE "
        "before any --config.KEY=VALUE, and --help lists them."
    )
