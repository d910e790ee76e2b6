"""What every objective is: a builder of regression targets, and the rule that moves samples.

Time runs from noise (t = 0) to data (t = 1); x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I).
The step size d is the length of the jump a prediction is for; d = 0 asks for the instantaneous
velocity of the flow.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import rng
from shortcut_jax.errors import UserError

# velocity(x [B,H,W,C], t [B], d [B], labels [B]) -> prediction [B,H,W,C]
Velocity = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Batch:
    """Real data: what the input pipeline gives."""

    image: jax.Array  # [B, H, W, C] float32, pixels in [-1, 1] or latents
    label: jax.Array  # [B] int32 in [0, num_classes)
    noise: jax.Array | None = None  # like image: of pairs (reflow), where x_0 belongs to x_1


@flax.struct.dataclass
class Velocities:
    """The networks an objective may ask. All are the same function of different parameters."""

    online: Velocity = flax.struct.field(pytree_node=False)
    ema: Velocity = flax.struct.field(pytree_node=False)
    teacher: Velocity | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Progress:
    """Where training stands, for methods whose targets change as it goes."""

    step: jax.Array  # int32, number of updates done
    total_steps: int = flax.struct.field(pytree_node=False)

    def stage(self, num_stages: int) -> jax.Array:
        """Which of `num_stages` equal parts of the training this step is in: int32 from 0."""
        starts = [-(-i * self.total_steps // num_stages) for i in range(1, num_stages)]
        return jnp.sum(self.step >= np.array(starts, np.int32), dtype=jnp.int32)

    def starts_stage(self, num_stages: int) -> jax.Array:
        """Whether this is the first step of a stage other than the first: bool."""
        before = self.replace(step=self.step - 1)  # type: ignore[attr-defined]
        return self.stage(num_stages) != before.stage(num_stages)


@flax.struct.dataclass
class Targets:
    """One training batch: what the network sees, and what it must answer."""

    x_t: jax.Array  # [B, H, W, C] float32
    t: jax.Array  # [B] float32 in [0, 1)
    d: jax.Array  # [B] float32 in [0, 1]; 0 = instantaneous velocity
    labels: jax.Array  # [B] int32 in [0, num_classes]; num_classes = the null label
    target: jax.Array  # [B, H, W, C] float32, no gradient flows into it
    weight: jax.Array  # [B] float32, of the row's squared error
    branch: jax.Array  # [B] int32, index into Objective.branches: which loss the row belongs to


class Objective(abc.ABC):
    """A method: how its training targets are built and how its samples are moved.

    Attributes:
      uses_step_size: whether the network is told the step size d.
      uses_guidance: whether cfg_scale may be anything but 0 (unconditional) and 1 (no guidance).
      teacher: who the trained network `config.teacher` is asked by: nobody, `targets` in every
        step, or the sampler that makes pairs of noise and sample before training.
      num_stages: equal parts of the training that differ in their targets.
      promotes_student: whether the teacher becomes the EMA of the student at the end of a stage.
      differentiates_forward: whether targets take the forward-mode derivative of the network.
      model_settings: keys of config.model that the method cannot do without, set with it.
      authors_code: values of its config keys with which it does what the released code does.
      null_label: the label that stands for "no class": num_classes.
      cfg_scale: scale of classifier-free guidance: 1 = none, 0 = unconditional.
      sampler: name of the rule in `step`.
    """

    uses_step_size: ClassVar[bool] = False
    uses_guidance: ClassVar[bool] = True
    teacher: ClassVar[Literal["none", "targets", "pairs"]] = "none"
    promotes_student: ClassVar[bool] = False
    differentiates_forward: ClassVar[bool] = False
    model_settings: ClassVar[Mapping[str, Any]] = {}
    authors_code: ClassVar[Mapping[str, Any]] = {}
    null_label: int
    cfg_scale: float
    sampler: str = "euler"

    @property
    def num_levels(self) -> int:
        """log2(1/d) of the smallest step size d; 0 for methods without step sizes."""
        return 0

    @property
    def num_stages(self) -> int:
        """See the class."""
        return 1

    @property
    @abc.abstractmethod
    def branches(self) -> tuple[str, ...]:
        """Names of the kinds of rows in a batch, for the logs; Targets.branch indexes them."""

    @abc.abstractmethod
    def target_evaluations(self, batch_size: int) -> float:
        """Rows that `targets` passes forward through a network in one step, on average.

        Training on the batch costs three more for each of its rows: forward 1, backward 2 (the
        paper's accounting of compute).
        """

    def validate(self, batch_size: int, num_shards: int) -> None:
        """Refuses settings that contradict each other, or a batch that cannot be split.

        Args:
          batch_size: global batch size.
          num_shards: number of equal parts the batch is sharded into.

        Raises:
          UserError: naming the smallest batch size that works.
        """
        if batch_size % num_shards:
            raise UserError(
                f"batch_size={batch_size} cannot be split over {num_shards} devices; the smallest "
                f"larger size that works is {-(-batch_size // num_shards) * num_shards}."
            )

    @abc.abstractmethod
    def targets(
        self,
        draw: rng.Draw,
        batch: Batch,
        velocities: Velocities,
        progress: Progress,
        num_shards: int = 1,
    ) -> tuple[Targets, Mapping[str, jax.Array]]:
        """Builds the targets of one step.

        Args:
          draw: gives the key of a named stream at this step.
          batch: real data.
          velocities: the networks that may be asked for targets.
          progress: where training stands.
          num_shards: parts the batch is sharded into. A hint about the layout: it decides where
            rows are computed, never what they are.

        Returns:
          The targets, in the batch's row order, and scalars to log.
        """

    def adaptive_weight(self, row_loss: jax.Array, pixels: int) -> jax.Array:
        """Weight [B] of rows by their loss, the mean squared error over so many pixels [B].

        There is no gradient in it.
        """
        return jnp.ones_like(row_loss)

    def check_steps(self, num_steps: int, key: str = "eval.steps") -> None:
        """Refuses a number of sampling steps that the method is not defined for.

        Args:
          num_steps: the number.
          key: of the config, flag or argument that holds it.

        Raises:
          UserError: it is not.
        """
        if why := self.refusal(num_steps):
            raise UserError(f"{key} holds {num_steps}; {why}.")

    def refusal(self, num_steps: int) -> str:
        """Why the method is not defined for so many sampling steps, "" if it is."""
        return "" if num_steps >= 1 else "a number of steps is at least 1"

    @abc.abstractmethod
    def guided(self, num_steps: int) -> bool:
        """Whether sampling in `num_steps` steps applies classifier-free guidance explicitly."""

    def query_size(self, d: jax.Array) -> jax.Array:
        """The step size the network is asked with when the sampler moves by d."""
        return jnp.zeros_like(d)

    def step(
        self,
        velocity: Velocity,
        x: jax.Array,
        t: jax.Array,
        d: jax.Array,
        labels: jax.Array,
        noise: Callable[[], jax.Array],
    ) -> jax.Array:
        """Moves samples from t to t + d: x + d * s(x, t, d) (paper, Algorithm 2).

        Args:
          velocity: the network, guided where `guided` says so.
          x: [B, H, W, C].
          t: [B].
          d: [B], the same for all; 1 / d is the number of steps.
          labels: [B].
          noise: draws N(0, I) of the shape of x, for this step alone; deterministic methods never
            call it.
        """
        del noise
        return x + rows(d) * velocity(x, t, self.query_size(d), labels)


def rows(a: jax.Array) -> jax.Array:
    """Gives per-row scalars [...] three trailing axes so that they broadcast over images."""
    return a[..., None, None, None]


def guide(velocity: Velocity, cfg_scale: float, null_label: int) -> Velocity:
    """Classifier-free guidance v = v_uncond + w (v_cond - v_uncond), both in one pass of 2B rows.

    w = 0 is the unconditional model alone and w = 1 the conditional one; each costs one pass.
    """
    if cfg_scale == 1.0:
        return velocity

    def unconditional(x, t, d, labels):
        return velocity(x, t, d, jnp.full_like(labels, null_label))

    def guided(x, t, d, labels):
        # Pairs side by side on a new axis 1, not halves one after the other on axis 0: the latter
        # would move every second row to another device when the rows are sharded.
        def pair(a, b):
            return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

        v = velocity(pair(x, x), pair(t, t), pair(d, d), pair(labels, 0 * labels + null_label))
        v = v.reshape(-1, 2, *v.shape[1:])
        v_cond, v_uncond = v[:, 0], v[:, 1]
        return v_uncond + cfg_scale * (v_cond - v_uncond)

    return unconditional if cfg_scale == 0.0 else guided


def sampling_velocity(objective: Objective, velocity: Velocity, guided: bool) -> Velocity:
    """The network as the sampler asks it: guided, unconditional (cfg_scale = 0) or plain."""
    scale = objective.cfg_scale
    if scale != 0.0 and not guided:
        scale = 1.0
    return guide(velocity, scale, objective.null_label)
