"""Time of a piece of work, by the clock on the wall and in CPU seconds, and what follows from it.

On a shared machine the wall tells how busy the others are; CPU seconds, which count all threads of
a process, tell what the work costs.
"""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.benchmarks import Measurement, summarize


@dataclasses.dataclass(frozen=True)
class Took:
    """What `count` pieces of work took, in seconds."""

    count: int
    wall: float
    cpu: float


def timed(work: Callable[[], int]) -> Took:
    """Runs work that returns how many pieces it did; CPU time is that of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = work()
    return Took(count, time.perf_counter() - wall, time.process_time() - cpu)


def timed_with_children(work: Callable[[], int]) -> Took:
    """As `timed`, with the CPU time of the worker processes that live all along."""
    before = _cpu_of_children()
    took = timed(work)
    return dataclasses.replace(took, cpu=took.cpu + _cpu_of_children() - before)


def rounds(contenders: Mapping[str, Callable[[], Took]], repeats: int) -> dict[str, list[Took]]:
    """Lets each work once to warm up, then all in turn, `repeats` times.

    In turn, so that a change of the machine's speed or load meets all of them.
    """
    for run in contenders.values():
        run()
    found: dict[str, list[Took]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            found[name].append(run())
    return found


def kinds() -> dict[str, str]:
    """Fields of `Took` to compare by, and what they are called: CPU seconds only of a CPU's work.

    An accelerator works while no CPU does.
    """
    found = {"wall": "time"}
    return found | {"cpu": "CPU s"} if jax.default_backend() == "cpu" else found


def rates(
    name: str, took: list[Took], what: str, conditions: dict[str, Any]
) -> Iterator[Measurement]:
    """Pieces of work per CPU second and per second."""
    per_cpu = [round_.count / round_.cpu for round_ in took]
    yield summarize(name, per_cpu, f"{what} / CPU s", conditions)
    yield summarize(
        name, [round_.count / round_.wall for round_ in took], f"{what} / s", conditions
    )


def ratio(
    name: str, ours: list[Took], theirs: list[Took], conditions: dict[str, Any]
) -> Measurement:
    """Our rate over theirs, per CPU second, round by round: above 1 we are faster."""
    values = [(a.count / a.cpu) / (b.count / b.cpu) for a, b in zip(ours, theirs, strict=True)]
    return summarize(name, values, "x per CPU s", conditions)


def _cpu_of_children() -> float:
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for process in multiprocessing.active_children():
        # After the name in brackets, which may hold anything: fields 3 and on of proc(5).
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks  # utime, stime
    return total
