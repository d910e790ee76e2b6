"""Consistency distillation (Song et al. 2023): neighbours are one Euler step of a teacher apart.

t is on {0, 1/M, ..., 1 - 1/M}, and the neighbour of x_t is x_t + v_teacher(x_t, t) / M.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import common
from shortcut_jax.objectives.consistency import Consistency


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(Consistency):
    """With a flow-matching teacher. See docs/differences.md for the fields."""

    bootstrap_clip: float = 0.0  # of the neighbour; 4 in the released code

    teacher: ClassVar = "targets"
    authors_code: ClassVar[Mapping[str, Any]] = {
        "noise_floor": 1e-5,
        "bootstrap_clip": 4.0,
        "sampler": "euler",
    }

    @property
    def branches(self):
        return ("consistency",)

    def target_evaluations(self, batch_size):
        return 2.0 * batch_size  # the teacher's step and the EMA's prediction

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del progress, num_shards
        shape = batch.label.shape
        labels = common.model_labels(batch.label, self.cfg_scale, self.null_label)

        d = 1 / self.denoise_timesteps
        t = common.sample_grid_times(draw("time"), shape, jnp.float32(self.denoise_timesteps))
        x0 = jax.random.normal(draw("noise"), batch.image.shape)
        x_t, _ = common.interpolate(x0, batch.image, t, self.noise_floor)
        v = velocities.teacher(x_t, t, jnp.zeros(shape), labels)
        x_next = common.clip(x_t + d * v, self.bootstrap_clip)

        targets, scalars = self.consistency_rows(velocities.ema, x_t, t, x_next, t + d, labels)
        return targets, {**scalars, "teacher_velocity_rms": common.rms(v)}
