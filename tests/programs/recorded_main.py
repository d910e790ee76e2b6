"""shortcut_jax.main that writes down its batches and can be killed: for tests/test_resume.py.

Appends a line per batch taken to WORKDIR/batches.txt: the step and a hash of the batch. Two
variables say when the process sends itself SIGKILL, which runs no handler and flushes nothing:

  KILL_AT_STEP=n   when batch n is asked for and the last checkpoint before it is complete
  KILL_IN_SAVE=n   when checkpoint n is written and about to be renamed to its final place
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from shortcut_jax import config_flag, main, workdir_flag
from shortcut_jax.data import pipeline

make_batches = pipeline.batches


def recorded_batches(dataset, *, start_step, **settings):
    workdir, every = Path(workdir_flag.workdir()), config_flag.CONFIG.value.checkpoint.every
    batches = make_batches(dataset, start_step=start_step, **settings)
    recorded = record(batches, start_step, workdir, every)
    return pipeline.Batches(recorded, workers=None)


def record(batches, start_step, workdir, every):
    for step, batch in enumerate(batches, start_step):
        if str(step) == os.environ.get("KILL_AT_STEP"):
            while not (workdir / "checkpoints" / str(step // every * every)).exists():
                time.sleep(0.01)
            kill()
        digest = hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch)))
        with (workdir / "batches.txt").open("a") as file:
            file.write(f"{step} {digest.hexdigest()}\n")
        yield batch


def kill_in_save(event, args):
    if event == "os.rename" and "orbax-checkpoint-tmp" in os.fspath(args[0]):
        name = os.path.basename(os.fspath(args[1]))
        if name == os.environ.get("KILL_IN_SAVE"):
            kill()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    pipeline.batches = recorded_batches
    sys.addaudithook(kill_in_save)  # the one place that sees a rename whoever asks for it
    config_flag.main(main.main)
