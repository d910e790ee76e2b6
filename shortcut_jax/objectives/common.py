"""What several objectives build their targets from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives.base import Targets, rows


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


def sample_grid_times(key: jax.Array, shape: tuple[int, ...], sections: jax.Array) -> jax.Array:
    """t uniform on {0, 1/sections, ..., 1 - 1/sections}; `sections` is a power of two."""
    return jnp.floor(jax.random.uniform(key, shape) * sections) / sections


def drop_labels(
    key: jax.Array, labels: jax.Array, probability: float, null_label: int
) -> jax.Array:
    """Replaces each label by the null label with the given probability (for guidance)."""
    dropped = jax.random.bernoulli(key, probability, labels.shape)
    return jnp.where(dropped, null_label, labels)


def model_labels(labels: jax.Array, cfg_scale: float, null_label: int) -> jax.Array:
    """The labels, or the null label for all if the model is unconditional (cfg_scale = 0)."""
    return jnp.full_like(labels, null_label) if cfg_scale == 0.0 else labels


def empirical_rows(
    draw: rng.Draw,
    x1: jax.Array,
    labels: jax.Array,
    *,
    x0: jax.Array | None = None,
    flow_time_grid: int,
    noise_floor: float,
    class_dropout: float,
    null_label: int,
) -> Targets:
    """Flow-matching rows [...]: the velocity x1 - x0 of the straight path, at d = 0 (eq. 1).

    Args:
      draw: of the streams "time", "noise" (unless x0 is given) and "dropout".
      x1: images [..., H, W, C].
      labels: [...].
      x0: noise that belongs to x1; drawn if not given.
      flow_time_grid: see `sample_flow_times`.
      noise_floor: see `interpolate`.
      class_dropout: probability of the null label.
      null_label: the null label.
    """
    shape = labels.shape
    t = sample_flow_times(draw("time"), shape, flow_time_grid)
    if x0 is None:
        x0 = jax.random.normal(draw("noise"), x1.shape)
    x_t, v = interpolate(x0, x1, t, noise_floor)
    return Targets(
        x_t=x_t,
        t=t,
        d=jnp.zeros(shape),
        labels=drop_labels(draw("dropout"), labels, class_dropout, null_label),
        target=v,
        weight=jnp.ones(shape),
        branch=jnp.zeros(shape, jnp.int32),
    )


def two_step_target(
    step: Callable[[jax.Array, jax.Array], jax.Array],
    x_t: jax.Array,
    t: jax.Array,
    d: jax.Array,
    *,
    clip_middle: float,
    clip_target: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The average velocity of two steps of size d, the second from where the first one led.

    Args:
      step: step(x, t) -> velocity with which to move by d.
      x_t: [..., H, W, C].
      t: [...].
      d: [...].
      clip_middle: limit of the state between the steps; 0 = none.
      clip_target: limit of the average; 0 = none.

    Returns:
      The target, through which no gradient flows, and magnitudes to log.
    """
    v1 = step(x_t, t)
    v2 = step(clip(x_t + rows(d) * v1, clip_middle), t + d)
    target = jax.lax.stop_gradient(clip((v1 + v2) / 2, clip_target))
    scalars = {"bootstrap_target_rms": target, "half_step_1_rms": v1, "half_step_2_rms": v2}
    return target, {name: rms(v) for name, v in scalars.items()}


def clip(x: jax.Array, limit: float) -> jax.Array:
    """x in [-limit, limit], or x itself if limit is 0."""
    return jnp.clip(x, -limit, limit) if limit else x


def rms(x: jax.Array) -> jax.Array:
    """Root mean square of all of x."""
    return jnp.sqrt(jnp.mean(x**2))


def not_a_power_of_two(num_steps: int, m: int, method: str) -> str:
    """Why a number of sampling steps that is no power of two up to M is none, "" if it is."""
    if 1 <= num_steps <= m and not num_steps & (num_steps - 1):
        return ""
    sizes = ", ".join(str(2**i) for i in range(m.bit_length()))
    return (
        f"{method} takes a power of two of steps from 1 to objective.denoise_timesteps={m}: "
        f"one of {sizes}"
    )


def check_denoise_timesteps(m: int) -> None:
    """Refuses a number M of smallest steps that cannot be halved down to 1 (UserError)."""
    if m < 2 or m & (m - 1):
        raise UserError(
            f"objective.denoise_timesteps={m} is not a power of two of at least 2; the paper "
            "uses 128."
        )
