"""The flag --config=FILE.py:ARG and its overrides, with every mistake in one sentence."""

import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from shortcut_jax import cli, objectives, validation, versions
from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError
from shortcut_jax.parallel import distributed, distributed_flag

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, e.g. configs/digits.py or configs/digits.py:small.",
    lock_config=True,
)


def main(function: Callable[[], None]) -> None:
    """As `cli.main`, for a binary with a config: its processes find each other and agree on it."""

    def joined() -> None:
        join()
        function()

    cli.main(joined, parse)


def join() -> None:
    """Joins the other processes of this run, if there are any, and agrees on code and config.

    Raises:
      UserError: a process is missing, or was started with something else.
    """
    distributed_flag.start()
    if distributed.several():
        config = config_lib.flatten(CONFIG.value or {})
        distributed.agree(versions.compared() | {f"config.{k}": v for k, v in config.items()})


def with_objective(name: str) -> ConfigDict:
    """The config that --config and its overrides describe, with another objective.

    Overrides of keys that this objective does not have are left out, and a scale of guidance of
    one that guides nothing, as in `config.build`.

    Raises:
      UserError: the config file takes no argument objective=NAME.
    """
    path, _, arg = str(_config_argument(sys.argv)).partition(":")
    words = [w for w in arg.split(",") if w and not w.strip().startswith("objective=")]
    config = load(f"{path}:{','.join([*words, f'objective={name}'])}")
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    known = config_lib.flatten(config)
    kept = {k: v for k, v in overrides.items() if k in known}
    scale = kept.get("objective.cfg_scale", 1)
    if scale not in (0, 1) and not objectives.OBJECTIVES[name].uses_guidance:
        del kept["objective.cfg_scale"]
    config.update_from_flattened_dict(kept)
    return config


def parse(argv: Sequence[str]) -> list[str]:
    """Parses argv, and checks the config file and its overrides first."""
    values: dict[str, Any] = {}
    try:
        file = _config_argument(argv)
        if file is None:
            flags.FLAGS(argv, known_only=True)  # there may be a --help
            raise UserError("--config is missing; give a config file, e.g. configs/digits.py.")
        # ml_collections loads the file again; what it says of mistakes in it, and of unknown keys,
        # is unclear, and comes as many types of exceptions.
        values = config_lib.flatten(load(file))
        _check_keys(flags.FLAGS.read_flags_from_files(argv), values)
        rest = flags.FLAGS(argv)
        cli.refuse_rest(rest)
        return rest
    except UserError as error:
        cli.fail(str(error))
    except flags.Error as error:
        cli.fail(_explain(str(error), values))


def _config_argument(argv: Sequence[str]) -> str | None:
    """FILE.py:ARG of --config=FILE.py:ARG; None if there is none."""
    only_config = flags.FlagValues()
    flags.DEFINE_multi_string("config", [], "", flag_values=only_config)
    only_config(argv, known_only=True)
    found = only_config.config
    if len(found) > 1:
        raise UserError(f"--config is given {len(found)} times ({', '.join(found)}); give it once.")
    return found[0] if found else None


def load(argument: str) -> ConfigDict:
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
    wrong_value = re.match(r"flag --config\.([\w.]+)=(.*?): ", refused, re.DOTALL)
    if wrong_value:
        key, found = wrong_value[1], repr(wrong_value[2])
        return f"--config.{validation.wrong_type(key, found, values[key])}"
    return cli.explain(refused).replace(
        "flags are written --name=value,",
        "flags are written --name=value, --config=FILE before any --config.KEY=VALUE,",
    )
