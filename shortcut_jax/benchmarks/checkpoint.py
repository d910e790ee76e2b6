"""Checkpoints of a train state: how long a save holds up the steps, is being written, and is read.

They lie in a temporary folder ($TMPDIR): a disk of this machine, not the storage of a pod.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from shortcut_jax import checkpoint, state
from shortcut_jax.benchmarks import Measurement, Options, runner, summarize, workloads

GIGA = 1e9


def measure(options: Options) -> Iterator[Measurement]:
    """The workload of this back end: seconds of a save beside those of a step."""
    workload, config = workloads.one(options.small)
    compiled = runner.compile_step(config)
    steps = runner.Steps({"": compiled})
    in_a_turn = 1 if jax.default_backend() == "cpu" else 10
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        checkpoints = checkpoint.Checkpoints(scratch, keep=1)
        shapes = checkpoint.with_shardings(
            compiled.program.state_shape, compiled.program.state_sharding
        )
        # The first round counts for the first save alone: it starts threads and compiles.
        first, *rounds = [
            _round(checkpoints, steps, i, in_a_turn, shapes) for i in range(options.repeats + 1)
        ]
        size = sum(p.stat().st_size for p in Path(scratch).rglob("*") if p.is_file())
        checkpoints.close()
    name = f"checkpoint/{workload}"
    conditions = compiled.facts() | {"bytes": size}

    def each(what: str) -> list[float]:
        return [seconds[what] for seconds in rounds]

    yield summarize(f"{name}/size", [size / GIGA], "GB", conditions)
    yield summarize(f"{name}/first save", [first["save"]], "s that steps wait", conditions)
    yield summarize(f"{name}/save", each("save"), "s that steps wait", conditions)
    shares = [seconds["save"] / seconds["step"] for seconds in rounds]
    yield summarize(f"{name}/save: of a step", shares, "x the time of a step", conditions)
    yield summarize(f"{name}/step", each("step"), "s / step", conditions)
    yield summarize(f"{name}/commit", each("commit"), "s from the save's begin", conditions)
    yield summarize(f"{name}/restore", each("restore"), "s", conditions)


def _round(
    checkpoints: checkpoint.Checkpoints,
    steps: runner.Steps,
    number: int,
    in_a_turn: int,
    shapes: Any,
) -> dict[str, float]:
    """Seconds of a step, of a save, until it is finished, and of reading it."""
    found = {"step": steps.run("", in_a_turn).wall / in_a_turn}
    start = time.perf_counter()
    checkpoints.save(number, state.fields(steps.state), {})
    found["save"] = time.perf_counter() - start
    checkpoints.wait()
    found["commit"] = time.perf_counter() - start
    found["restore"] = _seconds(
        lambda: jax.block_until_ready(checkpoints.restore(number, state.fields(shapes)))
    )
    return found


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
