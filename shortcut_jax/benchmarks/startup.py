"""From the start of a process to the end of its first step, stage by stage.

Each in a fresh process: with an empty compilation cache, then with what that one has left in it.
This process leaves the accelerator alone, as two cannot have it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shortcut_jax
from shortcut_jax.benchmarks import Measurement, Options, summarize
from shortcut_jax.errors import UserError

PROGRAM = Path(__file__).with_name("start.py")


def measure(options: Options) -> Iterator[Measurement]:
    """Seconds of every stage, and of all of them, with a cold and with a warm cache."""
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(1 if options.small else options.repeats):
        with tempfile.TemporaryDirectory(prefix="benchmark.") as cache:
            for runs in found.values():  # the first fills the cache of the second
                runs.append(_start(options.small, Path(cache)))
    for kind, runs in found.items():
        conditions = runs[0]["conditions"]
        name = f"startup/{conditions['workload']}/{kind}"
        stages = list(runs[0]["done"])
        for before, stage in zip([None, *stages], stages, strict=False):
            seconds = [r["done"][stage] - r["done"].get(before, 0.0) for r in runs]
            yield summarize(f"{name}: {stage}", seconds, "s", conditions)
        totals = [run["done"][stages[-1]] for run in runs]
        yield summarize(name, totals, "s to the end of the first step", conditions)


def _start(small: bool, cache: Path) -> dict[str, Any]:
    """What start.py says.

    Raises:
      UserError: it failed.
    """
    package = Path(shortcut_jax.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    env = os.environ | {
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    arguments = json.dumps({"began": time.monotonic(), "small": small})
    # -P: nothing shall be imported from the program's folder, where a data.py lies, too.
    command = [sys.executable, "-P", str(PROGRAM), arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        raise UserError(
            f"--parts=startup: the process that starts a run has ended ({last[0].rstrip('.')}); "
            "expected a device that no other process holds: end that one, or leave the part out."
        )
    return json.loads(done.stdout.splitlines()[-1])
