"""The step of a run with all that it takes to compile it: for this machine or for another one."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shortcut_jax import averages, run, state
from shortcut_jax.objectives import Batch
from shortcut_jax.parallel import sharding
from shortcut_jax.state import TrainState

TrainStep = Callable[[TrainState, Batch], TrainState]


@dataclasses.dataclass(frozen=True)
class Program:
    """What `build` makes; nothing of it is compiled yet.

    Attributes:
      init: makes a fresh train state.
      step: the training step.
      state_shape: of the train state.
      state_sharding: of the train state.
      batch_shape: of what the step is given.
      mesh: of the run.
    """

    init: Callable[[], TrainState]
    step: TrainStep
    state_shape: TrainState
    state_sharding: TrainState
    batch_shape: Batch
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """(state, batch) -> state: the step for the devices of the mesh, state updated in place."""
        return self._lower(self.step, self.batch_shape)

    def compile(self) -> jax.stages.Compiled:
        """What `lower` gives, compiled."""
        return self._compile(self.lower())

    def compile_several(self, most: int) -> jax.stages.Compiled:
        """(state, batches, count) -> state: steps that the host has no part in, one after another.

        Their numbers are those of so many calls of the step of `compile`, to the last bit.

        Args:
          most: length of the tuple `batches`, of which the first `count`, int32 [], are used.
        """

        def several(old: TrainState, batches: tuple[Batch, ...], count: jax.Array) -> TrainState:
            if most == 1:
                return self.step(old, batches[0])
            stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
            return jax.lax.fori_loop(
                0, count, lambda i, new: self.step(new, jax.tree.map(lambda a: a[i], stacked)), old
            )

        count = jax.ShapeDtypeStruct((), jnp.int32)
        whole = (sharding.replicated(self.mesh),)
        return self._compile(self._lower(several, (self.batch_shape,) * most, count, further=whole))

    def _lower(
        self, step: Callable[..., TrainState], *inputs: Any, further: tuple[Any, ...] = ()
    ) -> jax.stages.Lowered:
        jitted = jax.jit(
            step,
            in_shardings=(self.state_sharding, sharding.batch_sharding(self.mesh), *further),
            out_shardings=self.state_sharding,
            donate_argnums=0,
        )
        return jitted.lower(self.state_shape, *inputs)

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        options = state.compiler_options(sharding.platform(self.mesh))
        return lowered.compile(compiler_options=options)


def dispatches(config: ConfigDict, first: int) -> Iterator[tuple[int, int]]:
    """Where the host has something to do: (steps done, steps that the devices are given then).

    They get `steps_per_dispatch`, or as many as there are up to where something is next logged,
    evaluated or saved. The last is (total_steps, 0).
    """
    every = [config.log.every, config.checkpoint.every, config.eval.every]
    every += [config.averages.snapshot_every] if config.averages.power else []
    step = first
    while step < config.total_steps:
        to_next = (n - step % n for n in every if n > 0)
        count = min(config.steps_per_dispatch, config.total_steps - step, *to_next)
        yield step, count
        step += count
    if step == config.total_steps:  # which a run with fewer steps than its checkpoint has passed
        yield step, 0


def build(
    setup: run.Setup,
    step: TrainStep,
    optimizer: optax.GradientTransformation,
    batch_shape: Batch,
) -> Program:
    """Shapes and shardings of a run's state, whose metrics are those that the step makes.

    Args:
      setup: of the run, on the mesh that the program is for.
      step: from `train.make_train_step`.
      optimizer: the same.
      batch_shape: jax.ShapeDtypeStructs of what the step is given.
    """
    objective, seed = setup.objective, setup.config.seed

    def init() -> TrainState:
        params = state.init_params(setup.network, setup.image_shape, seed)
        # The EMA starts at the initial parameters, with neither a warm-up of its rate nor a
        # correction of this bias: so does the released code's.
        ema = jax.tree.map(jnp.copy, params)
        teacher = jax.tree.map(jnp.copy, params) if objective.teacher == "targets" else {}
        zero = jnp.zeros((), jnp.int32)
        further = averages.start(setup.config.averages, params)
        return TrainState(zero, params, ema, optimizer.init(params), teacher, {}, further)

    metrics_shape = jax.eval_shape(step, jax.eval_shape(init), batch_shape).metrics

    def init_with_metrics() -> TrainState:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), metrics_shape)
        return dataclasses.replace(init(), metrics=zeros)

    shape = jax.eval_shape(init_with_metrics)
    placed = sharding.shard_tree(shape, setup.mesh)
    return Program(init_with_metrics, step, shape, placed, batch_shape, setup.mesh)
