"""The step of a run with all that it takes to compile it: for this machine or for another one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from shortcut_jax import averages, run, sharding, state
from shortcut_jax.objectives import Batch
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
        """The step for the devices of the mesh, as the compiler gets it; state updated in place."""
        jitted = jax.jit(
            self.step,
            in_shardings=(self.state_sharding, sharding.batch_sharding(self.mesh)),
            out_shardings=self.state_sharding,
            donate_argnums=0,
        )
        return jitted.lower(self.state_shape, self.batch_shape)

    def compile(self) -> jax.stages.Compiled:
        """The step for the devices of the mesh."""
        options = state.compiler_options(sharding.platform(self.mesh))
        return self.lower().compile(compiler_options=options)


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
        # The EMA starts at the initial parameters: no warm-up, no bias correction (1.16).
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
