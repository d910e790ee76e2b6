"""One of several processes, of which the first is done before the last: test_distributed.py.

python -m tests.programs.done_early OUT HOW --config=FILE ...: process 1 works on for some seconds
after process 0 is done, and then leaves OUT/done (HOW = ends), ends with an error of the user's
(fails) or is killed (dies). Process 0 leaves OUT/waited when it ends and the other has ended, too.
"""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

import jax

from shortcut_jax import config_flag
from shortcut_jax.errors import UserError


def look() -> None:
    """Before jax.distributed waits for the others, as it does when a process ends."""
    if (OUT / "done").exists():
        (OUT / "waited").touch()


def main() -> None:
    if jax.process_index() == 0:
        atexit.register(look)
        return
    time.sleep(2)
    (OUT / "done").touch()
    if HOW == "fails":
        raise UserError("this host has no disk.")
    if HOW == "dies":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    OUT, HOW = Path(sys.argv.pop(1)), sys.argv.pop(1)
    config_flag.main(main)
