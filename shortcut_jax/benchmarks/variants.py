"""Ways to compute the same training step, the best of which is looked for one choice at a time.

Attention first, then what is computed again, then unrolled or scanned layers, then the batch: each
choice is tried with the best of those before it, and what wins is kept. All compiled programs are
of the step that `train.train` runs.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from shortcut_jax import device_memory
from shortcut_jax.benchmarks import Failure, Measurement, ceiling, summarize, timing, workloads
from shortcut_jax.benchmarks.correct import kernels
from shortcut_jax.benchmarks.runner import Step, Steps, compile_step
from shortcut_jax.benchmarks.timing import Took

GIGA = 1e9
FILL = 0.9  # of the memory: what else runs needs some
OBJECTIVE = "shortcut_1_4"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Keys of a config that change how a step is computed, and the batch."""

    batch_size: int
    attention: str = "xla"
    remat: str = "dots"
    scan_layers: bool = True

    def name(self) -> str:
        """As it is called in measurements."""
        loop = "scanned" if self.scan_layers else "unrolled"
        return f"{self.attention},{self.remat},{loop},{self.batch_size}"

    def configure(self, network: Any, contender: str = OBJECTIVE) -> ConfigDict:
        """The config of a run of it."""
        config = workloads.contenders(network, self.batch_size, (contender,))[contender]
        config.model.update(
            attention=self.attention, remat=self.remat, scan_layers=self.scan_layers
        )
        return config


class Sweep:
    """Tries variants of the step of a network.

    Args:
      part: begins the names of what is found.
      network: see `workloads.build`.
      batch_size: to begin with; that of the other implementations.
      deadline: of time.monotonic(), after which nothing new is tried.
      repeats: rounds.
      steps: in a turn.
      small: a small ceiling, to see that it runs.

    Attributes:
      rates: rows per second of the variants that ran.
    """

    def __init__(
        self, part: str, network: Any, batch_size: int, deadline: float,
        repeats: int = 3, steps: int = 5, small: bool = False,
    ) -> None:  # fmt: skip
        self._part, self._network, self._deadline = part, network, deadline
        self._repeats, self._steps, self._small = repeats, steps, small
        self._first = Variant(batch_size)
        self._ceilings: dict[str, Callable[[], Took]] = {}
        self._needs: dict[Variant, Step] = {}
        self.rates: dict[Variant, float] = {}

    def run(self) -> Iterator[Measurement | Failure]:
        """Everything; the last measurement names the winner."""
        first = self._first
        names = kernels("float32" if jax.default_backend() == "cpu" else "bfloat16")
        yield from self._try(dataclasses.replace(first, attention=name) for name in names)
        best = self._best()
        yield from self._try([dataclasses.replace(best, remat=r) for r in ("none", "full")])
        yield from self._try([dataclasses.replace(self._best(), scan_layers=False)])
        same_batch = self._best()
        yield from self._try(self._fuller())
        if not self.rates:
            return
        for what, variant in (("same batch", same_batch), ("winner", self._best())):
            conditions = dataclasses.asdict(variant) | {"variant": variant.name()}
            yield summarize(f"{self._part}: {what}", [self.rates[variant]], "rows / s", conditions)
        # For the comparison with others, whose batch is that of the beginning.
        yield from self._time(same_batch, "flow_matching")

    def _best(self) -> Variant:
        return max(self.rates, key=self.rates.__getitem__, default=self._first)

    def _fuller(self) -> list[Variant]:
        """The best with the batch that fills the memory and with half of it, largest first."""
        best, limit = self._best(), workloads.memory_limit()
        if best not in self._needs:
            return []
        if limit is None:
            return [dataclasses.replace(best, batch_size=2 * best.batch_size)]
        step = self._needs[best]
        config, shards = step.setup.config, step.setup.mesh.size
        most = device_memory.largest_batch(
            config, shards, FILL * limit, step.state_bytes, step.peak
        )
        # Products of multiples of 32 rows run well.
        unit = 32 * shards
        sizes = {n // unit * unit for n in (most or 0, (most or 0) // 2)}
        larger = sorted((n for n in sizes if n > best.batch_size), reverse=True)
        return [dataclasses.replace(best, batch_size=n) for n in larger]

    def _try(self, variants: Iterable[Variant]) -> Iterator[Measurement | Failure]:
        for variant in variants:
            if variant not in self.rates:
                yield from self._time(variant, OBJECTIVE)

    def _time(self, variant: Variant, contender: str) -> Iterator[Measurement | Failure]:
        name = f"{self._part}/{contender}/{variant.name()}"
        if time.monotonic() > self._deadline:
            yield Failure(name, "not tried: the time is up")
            return
        try:
            found = self._measure(name, variant, contender)
        except Exception as error:  # whatever a compiler or a device says: the others go on
            said = f"{type(error).__name__}: {error}"[:1000]
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            # Of the first it would mean that others use the memory.
            yield Failure(name, said, too_large=full and bool(self.rates))
            return
        yield from found

    def _measure(self, name: str, variant: Variant, contender: str) -> list[Measurement]:
        step = compile_step(variant.configure(self._network, contender))
        limit = workloads.memory_limit()
        if step.peak > (limit or math.inf):
            raise MemoryError(f"needs {step.peak / GIGA:.1f} GB of {(limit or 0) / GIGA:.1f}")
        running = Steps({name: step})
        turns: dict[str, Callable[[], Took]] = {
            name: functools.partial(running.run, name, self._steps)
        }
        if not self._ceilings:
            mesh, dtype = step.setup.mesh, step.setup.network.dtype
            self._ceilings = ceiling.contenders(dtype, mesh, self._steps, self._small)
        took = timing.rounds(turns | self._ceilings, self._repeats)
        rows = [variant.batch_size * t.count / t.wall for t in took[name]]
        if contender == OBJECTIVE:
            self.rates[variant] = sorted(rows)[len(rows) // 2]
            self._needs[variant] = step
        conditions = step.facts() | dataclasses.asdict(variant) | {"steps_in_a_turn": self._steps}
        most = [rate / GIGA for rate in ceiling.best(took)]
        return [
            summarize(name, [t.wall / t.count for t in took[name]], "s / step", conditions),
            summarize(f"{name}: rows", rows, "rows / s", conditions),
            *ceiling.utilisation(name, step.flops, took[name], took, conditions),
            summarize(f"{name}: ceiling", most, "GFLOP / s", conditions),
            summarize(f"{name}: peak memory", [step.peak / GIGA], "GB / device", conditions),
            summarize(f"{name}: compilation", [step.seconds], "s", conditions),
        ]
