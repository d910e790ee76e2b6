"""Several calls of one command in one process, whose start takes longer than most of them.

python -m tests.programs.in_turn eval '[["calc", "--images=a.npz", ...], ...]' prints, in a last
line, JSON: for each call its status, what it printed, and its error.
"""

import contextlib
import importlib
import io
import json
import sys

# These define flags, which flagsaver would take away again if they came later.
import grain  # noqa: F401
from absl import flags
from absl.testing import flagsaver

from shortcut_jax import cli
from shortcut_jax.errors import UserError


def call(module, args):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = ["command", *args]  # which ml_collections looks at
            module.main(*parser(module)(sys.argv)[1:])
        except UserError as error:  # as `cli.main` does
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except SystemExit as end:
            status = end.code
        finally:
            flags.FLAGS.unparse_flags()
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    return {"status": status, "out": out.getvalue(), "error": "".join(errors)[len("error: ") :]}


def parser(module):
    """What gives meaning to its arguments: its own, that of a config, or plain flags."""
    if hasattr(module, "parse"):
        return module.parse
    return module.config_flag.parse if hasattr(module, "config_flag") else cli.parse_flags


if __name__ == "__main__":
    command = importlib.import_module(f"shortcut_jax.{sys.argv[1]}")
    calls = json.loads(sys.argv[2])
    print(json.dumps([call(command, args) for args in calls]))
