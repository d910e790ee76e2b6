"""The training step: FLOPs by formula and by XLA, time, use of the devices, memory, compile time.

And what a shortcut step costs beside one of flow matching, next to what their FLOPs say.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shortcut_jax import flops, run, sharding, topology, train
from shortcut_jax.benchmarks import (
    Measurement,
    Options,
    ceiling,
    inputs,
    summarize,
    timing,
    workloads,
)
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.program import Program

GIGA = 1e9
FILL = 0.9  # of the memory: what else runs needs some
FIRST_BATCH = 16  # per device; from what it needs follows what fills the memory


def measure(options: Options) -> Iterator[Measurement]:
    """The workloads of this back end."""
    for workload in workloads.standard(options.small):
        size = workload.batch_size or filling_batch(workload.configs)
        yield from measure_steps(
            f"step/{workload.name}",
            workload.configs(size),
            repeats=options.repeats,
            steps=1 if jax.default_backend() == "cpu" else 10,
            small=options.small,
        )


def filling_batch(configs: Callable[[int], dict[str, ConfigDict]]) -> int:
    """A batch size with which the step that needs most memory fills the devices.

    Args:
      configs: those of a batch size, by name.

    Raises:
      ValueError: the devices do not say how much memory they have, or one row is too much.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    config = configs(FIRST_BATCH * jax.device_count())[workloads.MOST_MEMORY]
    step = compile_step(config)
    found = topology.largest_batch(
        config, step.program.mesh.size, limit and FILL * limit, step.state_bytes, step.peak
    )
    if not found:
        raise ValueError(f"no batch fills {limit} bytes of a device")
    return found


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
      setup: of the run.
      program: what was compiled.
      compiled: the step.
      flops: by the formula, over all devices.
      xla_flops: by XLA, per device; the body of a loop counts once.
      bytes_accessed: the same.
      peak: bytes of memory that it needs on a device.
      state_bytes: bytes of the train state on a device.
      seconds: of compilation.
    """

    setup: run.Setup
    program: Program
    compiled: jax.stages.Compiled
    flops: float
    xla_flops: float
    bytes_accessed: float
    peak: float
    state_bytes: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on."""
        config = self.setup.config
        return {
            "network": topology.network_name(config.model),
            "objective": dict(config.objective.items()),
            "image_shape": list(self.setup.image_shape),
            "batch_size": config.batch_size,
            "dtype": jnp.dtype(self.setup.network.dtype).name,
            "mesh": dict(self.setup.mesh.shape),
            "remat": config.model.remat,
            "loops": config.model.scan_layers or config.accumulation_steps > 1,
            "state_bytes": self.state_bytes,
        }


def compile_step(config: ConfigDict) -> Step:
    """Compiles the step that `train.train` would run, on the devices of this process."""
    setup = run.prepare(config, measures=False)
    program = train.build_program(setup, *topology.batch_shape(setup))
    start = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    return Step(
        setup=setup,
        program=program,
        compiled=compiled,
        flops=flops.train_step(config, setup.image_shape),
        xla_flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        peak=topology.peak_memory(compiled, sharding.platform(setup.mesh)),
        state_bytes=topology.state_bytes(program),
        seconds=seconds,
    )


class Steps:
    """Steps that take turns on one train state, of which large networks leave room for one only.

    Args:
      steps: of networks with the same parameters.
    """

    def __init__(self, steps: Mapping[str, Step]):
        self._steps = dict(steps)
        self.state = inputs.train_state(next(iter(self._steps.values())).program)
        self._own = {name: self._start(step.program) for name, step in self._steps.items()}
        self._batches = {
            name: inputs.batch(step.program, step.setup) for name, step in self._steps.items()
        }

    def run(self, name: str, count: int) -> Took:
        """Makes `count` steps and waits for the last."""
        step = self._steps[name].compiled
        state = dataclasses.replace(self.state, **self._own[name])
        batch = self._batches[name]

        def work() -> int:
            nonlocal state
            for _ in range(count):
                state = step(state, batch)
            jax.block_until_ready(state)
            return count

        took = timing.timed(work)
        self.state = state
        self._own[name] = {"metrics": state.metrics, "teacher": state.teacher}
        return took

    def _start(self, program: Program) -> dict[str, Any]:
        """The parts of a train state that not every step has."""

        def zeros() -> Any:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.state_shape.metrics)

        metrics = jax.jit(zeros, out_shardings=program.state_sharding.metrics)()
        teacher = jax.tree.map(jnp.copy, self.state.ema) if program.state_shape.teacher else {}
        return {"metrics": metrics, "teacher": teacher}


def measure_steps(
    name: str,
    configs: Mapping[str, ConfigDict],
    *,
    repeats: int = 5,
    steps: int = 10,
    small: bool = False,
) -> Iterator[Measurement]:
    """Measures steps of one network that take turns, and the ceiling between them.

    Args:
      name: begins the names of what is found: NAME/CONTENDER: WHAT, NAME/ceiling.
      configs: of the contenders, of the same network on the same devices; see
        `workloads.contenders`. Of every one but the first, the ratio to the first is found.
      repeats: rounds.
      steps: in a turn, which ends by waiting for the last.
      small: a small ceiling, to see that it runs.
    """
    compiled = {contender: compile_step(config) for contender, config in configs.items()}
    running = Steps(compiled)
    first = next(iter(compiled.values()))
    mesh, dtype = first.setup.mesh, first.setup.network.dtype
    turns: dict[str, Callable[[], Took]] = {
        contender: functools.partial(running.run, contender, steps) for contender in compiled
    }
    turns |= ceiling.contenders(dtype, mesh, steps, small)
    found = timing.rounds(turns, repeats)
    most = ceiling.best(found)
    conditions = first.facts() | {"steps_in_a_turn": steps}
    yield summarize(f"{name}/ceiling", [rate / GIGA for rate in most], "GFLOP / s", conditions)
    for contender, step in compiled.items():
        yield from _of_one(f"{name}/{contender}", step, found[contender], most, steps)
    base_name = next(iter(compiled))
    for contender in list(compiled)[1:]:
        pair, took = (compiled[contender], first), (found[contender], found[base_name])
        yield from _costs(f"{name}/{contender}", base_name, *pair, *took)


def _of_one(
    name: str, step: Step, took: list[Took], ceilings: list[float], steps: int
) -> Iterator[Measurement]:
    conditions = step.facts() | {"steps_in_a_turn": steps}
    conditions["compilation_cache"] = bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    devices = step.setup.mesh.size

    def once(what: str, value: float, unit: str) -> Measurement:
        return summarize(f"{name}: {what}", [value], unit, conditions)

    yield summarize(name, [t.wall / t.count for t in took], "s / step", conditions)
    rates = [t.count / t.wall for t in took]  # steps per second
    mfu = [step.flops * rate / most for rate, most in zip(rates, ceilings, strict=True)]
    yield summarize(f"{name}: MFU", mfu, "of the ceiling", conditions)
    rows = [step.setup.config.batch_size * rate for rate in rates]
    yield summarize(f"{name}: rows", rows, "rows / s", conditions)
    yield once("FLOPs", step.flops / devices / GIGA, "GFLOP / device")
    yield once("FLOPs by XLA", step.xla_flops / GIGA, "GFLOP / device")
    yield once("XLA / formula", step.xla_flops * devices / step.flops, "x")
    yield once("bytes accessed", step.bytes_accessed / GIGA, "GB / device")
    yield once("peak memory", step.peak / GIGA, "GB / device")
    yield once("compilation", step.seconds, "s")


def _costs(
    name: str, base_name: str, step: Step, base: Step, took: list[Took], base_took: list[Took]
) -> Iterator[Measurement]:
    """Cost of a step over that of another, and this over the ratio of their FLOPs, by round.

    On a CPU in CPU seconds, too, which other work on the machine disturbs less.
    """
    by_formula = step.flops / base.flops
    conditions = step.facts() | {"ratio_of_flops": by_formula}
    kinds = {"wall": "time", "cpu": "CPU s"}
    for kind in kinds if jax.default_backend() == "cpu" else ("wall",):
        pairs = zip(took, base_took, strict=True)
        ratios = [getattr(a, kind) / getattr(b, kind) for a, b in pairs]
        yield summarize(f"{name}: cost", ratios, f"x {base_name}'s {kinds[kind]}", conditions)
        relative = [ratio / by_formula for ratio in ratios]
        unit = f"x ratio of FLOPs ({kinds[kind]})"
        yield summarize(f"{name}: cost / FLOPs", relative, unit, conditions)
