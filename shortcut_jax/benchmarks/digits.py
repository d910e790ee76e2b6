"""Updates per second of the digits run, beside the authors' on the same batches; docs/host.md.

Both with the same sizes, batch and share of bootstrap rows, in turn in one process. In float32,
as ours is on a CPU; theirs also in the bfloat16 that their `main` leaves it at.

  trainer   all that happens from one log line to the next: batches of host memory, transfers,
            updates, fetching the metrics (for theirs, of one update, as their loop does)
  device    updates alone, of batches that are on the device, one after the other
"""

import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import run, spaces, train
from shortcut_jax.benchmarks import Measurement, Options, authors, summarize, timing
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset
from shortcut_jax.objectives import Batch
from shortcut_jax.parallel import sharding
from shortcut_jax.program import Program

ON_DEVICE = 8  # batches that "device" goes through


def measure(options: Options) -> Iterator[Measurement]:
    """Ours, several updates per dispatch and one; theirs, if there is a checkout; and ratios."""
    config = digits.get_config("small" if options.small else None)
    several = 2 if options.small else config.steps_per_dispatch
    updates = 2 * config.log.every if options.small else config.log.every
    setup = run.prepare(config, measures=False)
    data, _ = run.open_data(setup)
    ours = _Ours(setup, data)
    contenders: dict[str, Callable[[], int]] = {
        f"trainer/{several} per dispatch": ours.trainer(several, updates),
        "trainer/1 per dispatch": ours.trainer(1, updates),
        "device/ours": ours.device(updates),
    }
    if options.authors:
        theirs = _Theirs(config, Path(options.authors), data, jnp.float32)
        released = _Theirs(config, Path(options.authors), data, jnp.bfloat16)
        contenders |= {
            "trainer/authors": theirs.trainer(updates),
            "trainer/authors, bfloat16": released.trainer(updates),
            "device/authors": theirs.device(updates),
        }
    took = timing.rounds(
        {name: functools.partial(timing.timed, work) for name, work in contenders.items()},
        options.repeats,
    )
    conditions = {"batch_size": config.batch_size, "updates": updates, **config.model.to_dict()}
    for name, rounds in took.items():
        yield from timing.rates(f"digits/{name}", rounds, "updates", conditions)
    for name in (n for n in took if options.authors and "authors" not in n):
        kind = name.partition("/")[0]
        yield from _ratios(
            f"digits/{name}: ours / authors", took[name], took[f"{kind}/authors"], conditions
        )


def _ratios(
    name: str, ours: list[Took], theirs: list[Took], conditions: dict[str, Any]
) -> Iterator[Measurement]:
    yield timing.ratio(name, ours, theirs, conditions)
    walls = [(a.count / a.wall) / (b.count / b.wall) for a, b in zip(ours, theirs, strict=True)]
    yield summarize(name, walls, "x", conditions)


class _Ours:
    """The trainer from one log line to the next, without events."""

    def __init__(self, setup: run.Setup, data: Dataset) -> None:
        self._setup, self._data = setup, data
        self._program = _program(setup, data)
        self._new = jax.jit(self._program.init, out_shardings=self._program.state_sharding)
        self._compiled = functools.cache(self._program.compile_several)
        self._rows = sharding.batch_sharding(setup.mesh)

    def _counted(self, count: int) -> jax.Array:
        return sharding.to_global(np.int32(count), sharding.replicated(self._setup.mesh))

    def trainer(self, several: int, updates: int) -> Callable[[], int]:
        config, compiled = self._setup.config, self._compiled(several)
        state = self._new()

        def work() -> int:
            nonlocal state
            with pipeline.batches(
                self._data, batch_size=config.batch_size, seed=0, start_step=0, num_steps=updates,
                prefetch=max(8, several),
            ) as batches:  # fmt: skip
                for _ in range(updates // several):
                    ahead = tuple(
                        Batch(**sharding.to_global(next(batches), self._rows))
                        for _ in range(several)
                    )
                    state = compiled(state, ahead, self._counted(several))
                jax.device_get(state.metrics)
            return updates // several * several

        return work

    def device(self, updates: int) -> Callable[[], int]:
        compiled, state, one = self._compiled(1), self._new(), self._counted(1)
        batches = [
            Batch(**sharding.to_global(b, self._rows)) for b in _batches(self._setup, self._data)
        ]

        def work() -> int:
            nonlocal state
            for _, batch in zip(range(updates), itertools.cycle(batches), strict=False):
                state = compiled(state, (batch,), one)
            jax.block_until_ready(state)
            return updates

        return work


class _Theirs:
    """Their loop: `next` of the data, device_put, update; metrics fetched at the end."""

    def __init__(self, config: ConfigDict, checkout: Path, data: Dataset, dtype: Any) -> None:
        sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
        model = {name: config.model[name] for name in sizes} | {
            "num_classes": data.num_classes,
            "bootstrap_every": round(1 / config.objective.bootstrap_fraction),
            "class_dropout_prob": config.objective.class_dropout,
        }
        setting = authors.Setting(model, config.batch_size, data.image_shape, dtype)
        step = authors.build(checkout, setting)
        self._images, self._labels = (a.sharding for a in step.batch_shape)
        self._update, self._state = step.update, step.init(jax.random.key(0))
        self._host = [
            (b["image"], b["label"]) for b in _batches(run.prepare(config, measures=False), data)
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # their network prints while it is traced
            self._take(*self._place(*self._host[0]))

    def _place(self, images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jax.device_put(images, self._images), jax.device_put(labels, self._labels)

    def _take(self, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        self._state, info = self._update(self._state, None, images, labels)
        return info

    def trainer(self, updates: int) -> Callable[[], int]:
        def work() -> int:
            for _, batch in zip(range(updates), itertools.cycle(self._host), strict=False):
                info = self._take(*self._place(*batch))
            jax.device_get(info)
            return updates

        return work

    def device(self, updates: int) -> Callable[[], int]:
        placed = [self._place(*batch) for batch in self._host]

        def work() -> int:
            for _, batch in zip(range(updates), itertools.cycle(placed), strict=False):
                self._take(*batch)
            jax.block_until_ready(self._state)
            return updates

        return work


def _program(setup: run.Setup, data: Dataset) -> Program:
    def empty() -> Batch:
        size = setup.config.batch_size
        return Batch(jnp.zeros((size, *data.image_shape)), jnp.zeros(size, jnp.int32), None)

    _, draw_x1 = spaces.way_from(setup.space, data.holds)
    return train.build_program(setup, jax.eval_shape(empty), draw_x1)


def _batches(setup: run.Setup, data: Dataset) -> list[dict[str, np.ndarray]]:
    size = setup.config.batch_size
    with pipeline.batches(
        data, batch_size=size, seed=0, start_step=0, num_steps=ON_DEVICE
    ) as batches:
        return list(batches)
