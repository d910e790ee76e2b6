"""Checkpoints of a train state: what a save costs the steps, and how long writing and reading take.

They lie in a temporary folder ($TMPDIR): a disk of this machine, not the storage of a pod. On a CPU
copies, checksums and writing take from the steps the cores that they run on; so what counts is not
how soon `save` returns, but what steps take with a save in their middle beside as many without.
"""

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import checkpoint, state
from shortcut_jax.benchmarks import Measurement, Options, runner, summarize, timing, workloads

GIGA = 1e9
COPIES = ("device", "host")
FEWEST = 2  # steps in a turn, of which one half comes after the save


def measure(options: Options) -> Iterator[Measurement]:
    """The workload of this back end and the run on digits: a save beside steps, both ways."""
    name, config = workloads.one(options.small)
    yield from _measure(name, config, options)
    if not options.small:
        yield from _measure("digits", digits.get_config(), options)


def _measure(workload: str, config: ConfigDict, options: Options) -> Iterator[Measurement]:
    compiled = runner.compile_step(config)
    steps = runner.Steps({"": compiled})
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        saves = {copy: _Saves(f"{scratch}/{copy}", copy, compiled) for copy in COPIES}
        # The first save starts threads and compiles.
        first = {copy: saves[copy].alone(steps)["save"] for copy in COPIES}
        alone = {
            copy: [saves[copy].alone(steps) for _ in range(options.repeats)] for copy in COPIES
        }
        lasts = max(found["written"] for rounds in alone.values() for found in rounds)
        second_half = math.ceil(1.5 * lasts / (steps.run("", FEWEST).wall / FEWEST))
        count = FEWEST if options.small else max(FEWEST, 2 * second_half)
        contenders: dict[str, Callable[[], timing.Took]] = {
            "without": functools.partial(steps.run, "", count)
        }
        for copy in COPIES:
            contenders[copy] = functools.partial(saves[copy].among, steps, count)
        took = timing.rounds(contenders, options.repeats)
        start = time.perf_counter()
        saves["host"].restore()
        restored = time.perf_counter() - start
        for copy in COPIES:
            saves[copy].checkpoints.close()
        size = sum(p.stat().st_size for p in Path(scratch, "host").rglob("*") if p.is_file())
    name = f"checkpoint/{workload}"
    conditions = compiled.facts() | {"bytes": size, "steps": count}
    step = statistics.median(round_.wall for round_ in took["without"]) / count
    yield summarize(f"{name}/size", [size / GIGA], "GB", conditions)
    yield summarize(f"{name}/step", [r.wall / count for r in took["without"]], "s", conditions)
    yield summarize(f"{name}/restore", [restored], "s", conditions)
    for copy in COPIES:
        by = f"{name}/{copy}"
        yield summarize(f"{by}/first save", [first[copy]], "s until it returns", conditions)
        waits = [found["save"] for found in alone[copy]]
        yield summarize(f"{by}/save", waits, "s until it returns", conditions)
        shares = [seconds / step for seconds in waits]
        yield summarize(f"{by}/save: of a step", shares, "x a step", conditions)
        written = [found["written"] for found in alone[copy]]
        yield summarize(f"{by}/written", written, "s from the save's begin", conditions)
        pairs = list(zip(took[copy], took["without"], strict=True))
        for kind, unit in timing.kinds().items():
            ratios = [getattr(a, kind) / getattr(b, kind) for a, b in pairs]
            unit = f"x the {unit} of {count} steps without"
            yield summarize(f"{by}/steps with a save", ratios, unit, conditions)


class _Saves:
    """Saves of the state of some steps, one after the other, into a folder of their own."""

    def __init__(self, folder: str, copy: str, step: runner.Step) -> None:
        self.checkpoints = checkpoint.Checkpoints(folder, keep=1, copy=copy)
        shapes = checkpoint.with_shardings(step.program.state_shape, step.program.state_sharding)
        self._shapes = state.fields(shapes)
        self._number = 0

    def alone(self, steps: runner.Steps) -> dict[str, float]:
        """Seconds until a save returns, and until it is written, beside nothing."""
        start = time.perf_counter()
        self._save(steps.state)
        found = {"save": time.perf_counter() - start}
        self.checkpoints.wait()
        return found | {"written": time.perf_counter() - start}

    def among(self, steps: runner.Steps, count: int) -> timing.Took:
        """Makes steps with a save in their middle, as the trainer does; waits for these alone."""
        took = steps.run("", count, halfway=self._save)
        self.checkpoints.wait()
        return took

    def restore(self) -> None:
        """Reads the newest one."""
        jax.block_until_ready(self.checkpoints.restore(self._number, self._shapes))

    def _save(self, train_state: Any) -> None:
        self._number += 1
        self.checkpoints.save(self._number, state.fields(train_state), {})
