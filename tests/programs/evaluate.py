"""Several calls of the evaluation binary in one process, whose start takes longer than most.

python -m tests.programs.evaluate '[["calc", "--images=a.npz", ...], ...]' prints, in a last line,
JSON: for each call its status, what it printed, and its error.
"""

import contextlib
import io
import json
import sys

# These define flags, which flagsaver would take away again if they came later.
import grain  # noqa: F401
from absl.testing import flagsaver

from shortcut_jax import eval
from shortcut_jax.errors import UserError


def call(args):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = ["eval", *args]  # which ml_collections looks at
            eval.main(eval.parse(sys.argv)[1])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except SystemExit as end:
            status = end.code
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    return {"status": status, "out": out.getvalue(), "error": "".join(errors)[len("error: ") :]}


if __name__ == "__main__":
    print(json.dumps([call(args) for args in json.loads(sys.argv[1])]))
