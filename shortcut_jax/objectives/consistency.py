"""Consistency models (Song et al. 2023) on the straight path, with a velocity network.

A network v stands for the prediction f(x_t, t) = x_t + (1 - t) v(x_t, t) of the end of the path
that x_t lies on. Neighbours on a path must agree: f(x_t, t) -> f(x_{t+d}, t + d), the latter by the
EMA. This file has what training and distillation share: the target and the sampler.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import base, common
from shortcut_jax.objectives.base import rows


@dataclasses.dataclass(frozen=True)
class Consistency(base.Objective):
    """What both consistency objectives share. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0  # 1 = conditional, 0 = unconditional; nothing is guided
    denoise_timesteps: int = 128  # M: the finest neighbours are 1/M apart
    noise_floor: float = 0.0  # 1e-5 in the released code
    sampler: Literal["renoise", "euler"] = "renoise"  # see `step`

    uses_guidance: ClassVar = False

    def validate(self, batch_size, num_shards):
        common.check_denoise_timesteps(self.denoise_timesteps)
        super().validate(batch_size, num_shards)

    def consistency_rows(self, ema, x_t, t, x_next, t_next, labels):
        """Rows whose prediction at (x_t, t) shall be that of the EMA at (x_next, t_next).

        As a velocity, so that the network is trained like all others: f = x_t + (1 - t) v gives
        v = (f_next - x_t) / (1 - t). Its squared error is that of f divided by (1 - t)^2.
        """
        v_next = ema(x_next, t_next, jnp.zeros_like(t), labels)
        x1 = x_next + rows(1 - t_next) * v_next
        target = jax.lax.stop_gradient((x1 - x_t) / rows(1 - t))
        targets = base.Targets(
            x_t=x_t,
            t=t,
            d=jnp.zeros_like(t),
            labels=labels,
            target=target,
            weight=jnp.ones_like(t),
            branch=jnp.zeros(t.shape, jnp.int32),
        )
        scalars = {"bootstrap_target_rms": target, "next_velocity_rms": v_next}
        return targets, {name: common.rms(v) for name, v in scalars.items()}

    def refusal(self, num_steps):
        return common.not_a_power_of_two(num_steps, self.denoise_timesteps, "a consistency model")

    def guided(self, num_steps):
        return False

    def step(self, velocity, x, t, d, labels, noise):
        """ "renoise": predicts the end and draws x_{t+d} = (t+d) f + (1-t-d) noise, as Song et al.

        "euler" moves along the straight line to the predicted end instead, by d.
        """
        if self.sampler == "euler":
            return super().step(velocity, x, t, d, labels, noise)
        x1 = x + rows(1 - t) * velocity(x, t, self.query_size(d), labels)
        return rows(t + d) * x1 + rows(1 - t - d) * noise()
