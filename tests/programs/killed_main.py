"""shortcut_jax.main that kills itself in a chosen phase: for tests/test_soak.py.

KILL=PHASE:SECONDS sends SIGKILL that long after the first time that a phase is reached:

  start      the process has parsed its flags
  train      the first step is asked for
  save       the first save begins
  evaluate   the first evaluation begins
"""

import os
import signal
import threading

from shortcut_jax import checkpoint, config_flag, evaluation, main
from shortcut_jax.data import pipeline


def arm(phase: str) -> None:
    wanted, _, seconds = os.environ.get("KILL", "").partition(":")
    if wanted == phase:
        os.environ["KILL"] = ""
        threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()


def armed(phase, function):
    def call(*args, **kwargs):
        arm(phase)
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    pipeline.batches = armed("train", pipeline.batches)
    checkpoint.Checkpoints.save = armed("save", checkpoint.Checkpoints.save)
    evaluation.Evaluator.run = armed("evaluate", evaluation.Evaluator.run)
    config_flag.main(armed("start", main.main))
