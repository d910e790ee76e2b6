"""The training step: FLOPs by formula and by XLA, time, use of the devices, memory, compile time.

And what a shortcut step costs beside one of flow matching, next to what their FLOPs say.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from shortcut_jax import device_memory
from shortcut_jax.benchmarks import Measurement, Options, ceiling, summarize, timing, workloads
from shortcut_jax.benchmarks.runner import Step, Steps, compile_step
from shortcut_jax.benchmarks.timing import Took

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
    limit = workloads.memory_limit()
    config = configs(FIRST_BATCH * jax.device_count())[workloads.MOST_MEMORY]
    step = compile_step(config)
    found = device_memory.largest_batch(
        config, step.program.mesh.size, limit and FILL * limit, step.state_bytes, step.peak
    )
    if not found:
        raise ValueError(f"no batch fills {limit} bytes of a device")
    return found


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
    conditions = first.facts() | {"steps_in_a_turn": steps}
    most = [rate / GIGA for rate in ceiling.best(found)]
    yield summarize(f"{name}/ceiling", most, "GFLOP / s", conditions)
    for contender, step in compiled.items():
        conditions = step.facts() | {"steps_in_a_turn": steps}
        yield from _speed(f"{name}/{contender}", step, found[contender], conditions)
        yield from ceiling.utilisation(
            f"{name}/{contender}", step.flops, found[contender], found, conditions
        )
        yield from _counts(f"{name}/{contender}", step, conditions)
    base_name = next(iter(compiled))
    for contender in list(compiled)[1:]:
        pair, took = (compiled[contender], first), (found[contender], found[base_name])
        yield from _costs(f"{name}/{contender}", base_name, *pair, *took)


def _speed(
    name: str, step: Step, took: list[Took], conditions: dict[str, Any]
) -> Iterator[Measurement]:
    yield summarize(name, [t.wall / t.count for t in took], "s / step", conditions)
    rows = [step.setup.config.batch_size * t.count / t.wall for t in took]
    yield summarize(f"{name}: rows", rows, "rows / s", conditions)


def _counts(name: str, step: Step, conditions: dict[str, Any]) -> Iterator[Measurement]:
    """What the compiler says, beside the formula; nothing of it varies but compile time."""
    devices = step.setup.mesh.size
    # With a persistent cache, that of a program which it holds is the time to read it.
    cached = bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    for what, value, unit in (
        ("FLOPs", step.flops / devices / GIGA, "GFLOP / device"),
        ("FLOPs by XLA", step.xla_flops / GIGA, "GFLOP / device"),
        ("XLA / formula", step.xla_flops * devices / step.flops, "x"),
        ("bytes accessed", step.bytes_accessed / GIGA, "GB / device"),
        ("peak memory", step.peak / GIGA, "GB / device"),
        ("compilation", step.seconds, "s"),
    ):
        extra = {"compilation_cache": cached} if what == "compilation" else {}
        yield summarize(f"{name}: {what}", [value], unit, conditions | extra)


def _costs(
    name: str, base_name: str, step: Step, base: Step, took: list[Took], base_took: list[Took]
) -> Iterator[Measurement]:
    """Cost of a step over that of another, and this over the ratio of their FLOPs, by round."""
    by_formula = step.flops / base.flops
    conditions = step.facts() | {"ratio_of_flops": by_formula}
    for kind, called in timing.kinds().items():
        pairs = zip(took, base_took, strict=True)
        ratios = [getattr(a, kind) / getattr(b, kind) for a, b in pairs]
        yield summarize(f"{name}: cost", ratios, f"x {base_name}'s {called}", conditions)
        relative = [ratio / by_formula for ratio in ratios]
        yield summarize(f"{name}: cost / FLOPs", relative, f"x FLOPs' ({called})", conditions)
