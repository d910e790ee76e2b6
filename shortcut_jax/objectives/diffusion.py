"""Diffusion as in DiT (Peebles & Xie 2023): discrete, variance-preserving, noise prediction.

With signal levels alpha_bar_s of the linear schedule of DDPM (Ho et al. 2020), s = 0 ... 999:

  x_s = sqrt(alpha_bar_s) x_1 + sqrt(1 - alpha_bar_s) x_0,    network(x_s, s) -> x_0, the noise

The network's time is t = 1 - (s + 1) / 1000, so that here, too, t = 0 is noise and t = 1 is data.
Unlike DiT's the network does not predict the variance: all rows of the paper's table share one.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.objectives import base, common
from shortcut_jax.objectives.base import rows

NUM_TIMESTEPS = 1000
BETA_MIN, BETA_MAX = 1e-4, 0.02


def signal_levels() -> np.ndarray:
    """alpha_bar_s, s = 0 ... 999: what is left of the variance of the data. float64 [1000]."""
    return np.cumprod(1 - np.linspace(BETA_MIN, BETA_MAX, NUM_TIMESTEPS))


@dataclasses.dataclass(frozen=True)
class Diffusion(base.Objective):
    """DDPM with DiT's schedule. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0
    class_dropout: float = 0.1
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # ancestral, as DiT samples, or deterministic

    @property
    def branches(self):
        return ("empirical",)

    def target_evaluations(self, batch_size):
        return 0.0

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del velocities, progress, num_shards
        shape = batch.label.shape
        s = jax.random.randint(draw("time"), shape, 0, NUM_TIMESTEPS)
        alpha_bar = jnp.asarray(signal_levels(), jnp.float32)[s]
        x0 = jax.random.normal(draw("noise"), batch.image.shape)
        x_t = rows(jnp.sqrt(alpha_bar)) * batch.image + rows(jnp.sqrt(1 - alpha_bar)) * x0
        dropout = 1.0 if self.cfg_scale == 0.0 else self.class_dropout
        targets = base.Targets(
            x_t=x_t,
            t=_network_time(s),
            d=jnp.zeros(shape),
            labels=common.drop_labels(draw("dropout"), batch.label, dropout, self.null_label),
            target=x0,
            weight=jnp.ones(shape),
            branch=jnp.zeros(shape, jnp.int32),
        )
        return targets, {}

    def refusal(self, num_steps):
        if 1 <= num_steps <= NUM_TIMESTEPS:
            return ""
        return f"diffusion takes 1 to {NUM_TIMESTEPS} steps, its number of noise levels"

    def guided(self, num_steps):
        return True

    def step(self, velocity, x, t, d, labels, noise):
        """From noise level s(t) to s(t + d), levels of DiT's respacing; "velocity" is the noise.

        The posterior q(x_next | x, predicted data) of the respaced chain ("ddpm", Ho et al. eq. 7,
        with the posterior's own variance), or the same noise at the next level ("ddim", Song et al.
        2021, eq. 12 with sigma = 0). The last step leads to the data itself.
        """
        num_steps = jnp.round(1 / d)
        index = jnp.round(t / d)
        s, s_next = _respaced(index, num_steps), _respaced(index + 1, num_steps)
        levels = jnp.asarray(signal_levels(), jnp.float32)
        last = index + 1 >= num_steps
        a = rows(levels[s])
        a_next = rows(jnp.where(last, 1.0, levels[s_next]))

        predicted_noise = velocity(x, _network_time(s), jnp.zeros_like(t), labels)
        x1 = (x - jnp.sqrt(1 - a) * predicted_noise) / jnp.sqrt(a)
        if self.sampler == "ddim":
            return jnp.sqrt(a_next) * x1 + jnp.sqrt(1 - a_next) * predicted_noise
        alpha = a / a_next  # of the jump; beta = 1 - alpha
        mean = (jnp.sqrt(a_next) * (1 - alpha) * x1 + jnp.sqrt(alpha) * (1 - a_next) * x) / (1 - a)
        variance = (1 - a_next) / (1 - a) * (1 - alpha)
        return mean + jnp.sqrt(variance) * noise()


def _network_time(s: jax.Array) -> jax.Array:
    return 1 - (s + 1) / NUM_TIMESTEPS


def _respaced(index: jax.Array, num_steps: jax.Array) -> jax.Array:
    """The noise level of step `index` of `num_steps`: from 999 to 0, evenly; 999 if one step."""
    stride = (NUM_TIMESTEPS - 1) / jnp.maximum(num_steps - 1, 1)
    s = jnp.round(NUM_TIMESTEPS - 1 - index * stride).astype(jnp.int32)
    return jnp.clip(s, 0, NUM_TIMESTEPS - 1)
