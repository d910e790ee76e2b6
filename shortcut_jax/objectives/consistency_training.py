"""Consistency training (Song et al. 2023): neighbours are two points on the path of one pair.

Training has log2 M equal stages; in stage i the neighbours are d = 2^-i apart, on t = 0, d, ...,
1 - d. The pairing of noise and data is that of flow matching, x_t = (1 - t) x_0 + t x_1 at both
times, so no teacher is needed, but every such pair is but one of many that meet in x_t.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import common
from shortcut_jax.objectives.consistency import Consistency


@dataclasses.dataclass(frozen=True)
class ConsistencyTraining(Consistency):
    """End-to-end. See docs/differences.md for the fields."""

    authors_code: ClassVar[Mapping[str, Any]] = {"noise_floor": 1e-5}

    @property
    def num_stages(self):
        return self.denoise_timesteps.bit_length() - 1

    @property
    def branches(self):
        return ("consistency",)

    def target_evaluations(self, batch_size):
        return float(batch_size)

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del num_shards
        shape = batch.label.shape
        labels = common.model_labels(batch.label, self.cfg_scale, self.null_label)

        sections = jnp.ldexp(1.0, progress.stage(self.num_stages))  # 1, 2, 4, ... M/2
        t = common.sample_grid_times(draw("time"), shape, sections)
        x0 = jax.random.normal(draw("noise"), batch.image.shape)
        x_t, _ = common.interpolate(x0, batch.image, t, self.noise_floor)
        x_next, _ = common.interpolate(x0, batch.image, t + 1 / sections, self.noise_floor)

        targets, scalars = self.consistency_rows(
            velocities.ema, x_t, t, x_next, t + 1 / sections, labels
        )
        return targets, {**scalars, "sections": sections}
