"""The authors' training step (`authors.py`), timed as ours is."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax import run
from shortcut_jax.benchmarks import Measurement, authors, ceiling, inputs, summarize, timing
from shortcut_jax.benchmarks import workloads as workloads_lib
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.benchmarks.torch_step import speed
from shortcut_jax.planning import flops

GIGA = 1e9
# Our contender -> what their flags say for the same work.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow_matching": {"train_type": "naive"},
    "shortcut_1_4": {"train_type": "shortcut", "bootstrap_every": 4, "bootstrap_cfg": 0},
}


def measure_step(
    name: str,
    checkout: Path,
    network: Any,
    batch_size: int,
    *,
    repeats: int = 3,
    steps: int = 5,
    small: bool = False,
) -> Iterator[Measurement]:
    """Measures their steps, one after the other, and the ceiling.

    Args:
      name: begins the names of what is found.
      checkout: of their repository.
      network: see `workloads.build`.
      batch_size: over all devices.
      repeats: rounds.
      steps: in a turn.
      small: a small ceiling, to see that it runs.

    Raises:
      UserError: the folder is not their repository.
    """
    configs = workloads_lib.contenders(network, batch_size, tuple(OBJECTIVES))
    for contender, config in configs.items():
        setup = run.prepare(config, measures=False)
        dtype = setup.network.dtype
        keys = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
        model = {key: config.model[key] for key in keys} | OBJECTIVES[contender]
        model |= {"num_classes": setup.num_classes, "sharding": "dp"}
        setting = authors.Setting(model, batch_size, setup.image_shape, dtype)
        step = authors.build(checkout, setting)
        compiled = step.compile()
        turn = _Turn(step, compiled, steps)
        works: dict[str, Callable[[], Took]] = {contender: functools.partial(timing.timed, turn)}
        works |= ceiling.contenders(dtype, setup.mesh, steps, small)
        found = timing.rounds(works, repeats)
        conditions = {"batch_size": batch_size, "dtype": dtype.name, "steps_in_a_turn": steps}
        least = flops.train_step(config, setup.image_shape)
        took = found[contender]
        yield from speed(f"{name}/{contender}", batch_size, took, conditions)
        yield from ceiling.utilisation(f"{name}/{contender}", least, took, found, conditions)
        most = [rate / GIGA for rate in ceiling.best(found)]
        yield summarize(f"{name}/{contender}: ceiling", most, "GFLOP / s", conditions)
        del turn, works  # and with them a train state: the next one takes its place


class _Turn:
    """Steps from where the last turn has left off."""

    def __init__(self, step: authors.Step, compiled: jax.stages.Compiled, steps: int) -> None:
        images, labels = step.batch_shape
        self._batch = (
            jax.device_put(inputs.uniform(images.shape, 1.0), images.sharding),
            jax.device_put(jnp.arange(labels.size, dtype=jnp.int32), labels.sharding),
        )
        self._compiled, self._steps = compiled, steps
        self._state = step.init(jax.random.key(0))

    def __call__(self) -> int:
        for _ in range(self._steps):
            self._state, _ = self._compiled(self._state, None, *self._batch)
        jax.block_until_ready(self._state)
        return self._steps
