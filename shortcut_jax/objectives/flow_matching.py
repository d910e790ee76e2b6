"""Flow matching (Lipman et al. 2023; Liu et al. 2023), the d = 0 end of shortcut models.

E || v(x_t, t) - (x_1 - x_0) ||^2 on the straight path x_t = (1 - t) x_0 + t x_1.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.errors import UserError
from shortcut_jax.objectives import base


@dataclasses.dataclass(frozen=True)
class FlowMatching(base.Objective):
    """Regression of the instantaneous velocity. See `shortcut_jax.config` for the fields."""

    null_label: int
    cfg_scale: float = 1.0
    class_dropout: float = 0.1
    flow_time_grid: int = 0
    noise_floor: float = 0.0

    uses_step_size: ClassVar[bool] = False

    @property
    def num_levels(self):
        return 0

    @property
    def branches(self):
        return ("empirical",)

    def validate(self, batch_size, num_shards):
        if batch_size % num_shards:
            raise UserError(
                f"batch_size={batch_size} cannot be split over {num_shards} devices; the smallest "
                f"larger size that works is {-(-batch_size // num_shards) * num_shards}."
            )

    def targets(self, draw, batch, velocities, num_shards=1):
        del velocities, num_shards  # the targets are empirical and every row is alike
        rows = batch.label.shape
        t = base.sample_flow_times(draw("time"), rows, self.flow_time_grid)
        x0 = jax.random.normal(draw("noise"), batch.image.shape)
        x_t, v = base.interpolate(x0, batch.image, t, self.noise_floor)
        p_drop = 1.0 if self.cfg_scale == 0.0 else self.class_dropout
        targets = base.Targets(
            x_t=x_t,
            t=t,
            d=jnp.zeros(rows),
            labels=base.drop_labels(draw("dropout"), batch.label, p_drop, self.null_label),
            target=v,
            weight=jnp.ones(rows),
            branch=jnp.zeros(rows, jnp.int32),
        )
        return targets, {"target_rms": jnp.sqrt(jnp.mean(v**2))}

    def check_steps(self, num_steps):
        if num_steps < 1:
            raise UserError(f"eval.steps holds {num_steps}; a number of steps is at least 1.")

    def guided(self, num_steps):
        return True  # a velocity may be guided at every step

    def query_size(self, d):
        return jnp.zeros_like(d)
