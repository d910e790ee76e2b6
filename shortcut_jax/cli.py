"""What the two binaries share: the flags, and errors as one sentence instead of a traceback."""

import logging as stdlib_logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

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
    # Orbax reports a dozen lines per save through the same logger.
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > stdlib_logging.INFO or "orbax" not in record.pathname
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


def fail(sentence: str) -> None:
    """Prints one sentence and ends the process with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise UserError("--config is missing; give a config file, e.g. configs/digits.py.")
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value.")
        return rest
    except UserError as error:
        fail(str(error))
    # What ml_collections raises for unknown keys, wrong types and missing or broken files.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(f"a flag or config value was refused: {' '.join(str(error).split())}")
    raise AssertionError("unreachable: fail() ends the process")
