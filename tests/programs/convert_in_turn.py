"""Runs python -m shortcut_jax.convert with one list of arguments after the other.

Its argument is a JSON list of them. Prints a JSON list of [status, stdout, error] of each.
"""

import contextlib
import io
import json
import sys

from absl import flags
from absl.testing import flagsaver

from shortcut_jax import convert
from shortcut_jax.errors import UserError


def run(argv: list[str]) -> tuple[int, str, str]:
    sys.argv = ["convert", *argv]  # where ml_collections looks for overrides
    out, error = io.StringIO(), io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out):
        try:
            with contextlib.redirect_stderr(error):
                words = convert.parse(sys.argv)
            convert.main(*words[1:])
            return 0, out.getvalue(), ""
        except SystemExit as end:
            return int(str(end.code)), out.getvalue(), error.getvalue()
        except UserError as refused:  # as `cli.main` does
            return 2, out.getvalue(), f"error: {refused}"
        finally:
            flags.FLAGS.unparse_flags()


if __name__ == "__main__":
    print(json.dumps([run(argv) for argv in json.loads(sys.argv[1])]))
