"""What every objective is: a builder of regression targets, and the rule that moves samples.

Time runs from noise (t = 0) to data (t = 1); x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I).
The step size d is the length of the jump a prediction is for; d = 0 asks for the instantaneous
velocity of the flow.
"""

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from shortcut_jax import rng

# velocity(x [B,H,W,C], t [B], d [B], labels [B]) -> prediction [B,H,W,C]
Velocity = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Batch:
    """Real data: what the input pipeline gives."""

    image: jax.Array  # [B, H, W, C] float32, pixels in [-1, 1] or latents
    label: jax.Array  # [B] int32 in [0, num_classes)


@flax.struct.dataclass
class Velocities:
    """The networks an objective may ask. Both are the same function of different parameters."""

    online: Velocity = flax.struct.field(pytree_node=False)
    ema: Velocity = flax.struct.field(pytree_node=False)


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
      null_label: the label that stands for "no class": num_classes.
    """

    uses_step_size: ClassVar[bool]
    null_label: int
    cfg_scale: float

    @property
    @abc.abstractmethod
    def num_levels(self) -> int:
        """log2(1/d) of the smallest step size d; 0 for methods without step sizes."""

    @property
    @abc.abstractmethod
    def branches(self) -> tuple[str, ...]:
        """Names of the kinds of rows in a batch, for the logs; Targets.branch indexes them."""

    @abc.abstractmethod
    def validate(self, batch_size: int, num_shards: int) -> None:
        """Refuses a batch that this objective cannot split as its method says.

        Args:
          batch_size: global batch size.
          num_shards: number of equal parts the batch is sharded into.

        Raises:
          UserError: naming the smallest batch size that works.
        """

    @abc.abstractmethod
    def targets(
        self, draw: rng.Draw, batch: Batch, velocities: Velocities, num_shards: int = 1
    ) -> tuple[Targets, Mapping[str, jax.Array]]:
        """Builds the targets of one step.

        Args:
          draw: gives the key of a named stream at this step.
          batch: real data.
          velocities: the networks that may be asked for targets.
          num_shards: parts the batch is sharded into. A hint about the layout: it decides where
            rows are computed, never what they are.

        Returns:
          The targets, in the batch's row order, and scalars to log.
        """

    @abc.abstractmethod
    def check_steps(self, num_steps: int) -> None:
        """Refuses a number of sampling steps that the method is not defined for (UserError)."""

    @abc.abstractmethod
    def guided(self, num_steps: int) -> bool:
        """Whether sampling in `num_steps` steps applies classifier-free guidance explicitly."""

    @abc.abstractmethod
    def query_size(self, d: jax.Array) -> jax.Array:
        """The step size the network is asked with when the sampler moves by d."""

    def step(
        self, velocity: Velocity, x: jax.Array, t: jax.Array, d: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """Moves samples from t to t + d: x + d * s(x, t, d) (paper, Algorithm 2).

        Args:
          velocity: the network, guided where `guided` says so.
          x: [B, H, W, C].
          t: [B].
          d: [B].
          labels: [B].
        """
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


def interpolate(
    x0: jax.Array, x1: jax.Array, t: jax.Array, noise_floor: float
) -> tuple[jax.Array, jax.Array]:
    """The straight path and its velocity: x_t = (1-t) x0 + t x1, v = x1 - x0.

    `noise_floor` (1e-5 in the released code, 0 in the paper) keeps that much noise at t = 1:
    x_t = (1 - (1-f) t) x0 + t x1 and v = x1 - (1-f) x0.
    """
    keep = 1.0 - noise_floor
    return (1.0 - keep * rows(t)) * x0 + rows(t) * x1, x1 - keep * x0


def sample_flow_times(key: jax.Array, shape: tuple[int, ...], grid: int) -> jax.Array:
    """t of the flow-matching rows: U[0, 1) (paper), or uniform on {0, 1/grid, ...} if grid > 0."""
    t = jax.random.uniform(key, shape)
    return jnp.floor(t * grid) / grid if grid else t


def drop_labels(
    key: jax.Array, labels: jax.Array, probability: float, null_label: int
) -> jax.Array:
    """Replaces each label by the null label with the given probability (for guidance)."""
    dropped = jax.random.bernoulli(key, probability, labels.shape)
    return jnp.where(dropped, null_label, labels)
