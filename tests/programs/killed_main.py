"""shortcut_jax.main that kills itself in a chosen phase: for tests/test_soak.py.

KILL=PHASE:COUNT:SECONDS sends SIGKILL that long after a phase was reached the COUNTth time:

  start      the process has parsed its flags
  train      a batch is asked for
  save       a save begins
  evaluate   an evaluation begins
"""

import os
import signal
import threading
from collections import Counter

from shortcut_jax import checkpoint, config_flag, main
from shortcut_jax.evaluation import measuring
from shortcut_jax.parallel import sharding

PHASE, COUNT, SECONDS = (os.environ.get("KILL") or "none:0:0").split(":")
reached: Counter[str] = Counter()


def armed(phase, function):
    """The function, which starts the countdown when it is called."""

    def call(*args, **kwargs):
        reached[phase] += 1
        if (phase, str(reached[phase])) == (PHASE, COUNT):
            threading.Timer(float(SECONDS), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    sharding.to_global = armed("train", sharding.to_global)
    checkpoint.Checkpoints.save = armed("save", checkpoint.Checkpoints.save)
    measuring.Evaluator.run = armed("evaluate", measuring.Evaluator.run)
    config_flag.main(armed("start", main.main))
