"""Flow matching (Lipman et al. 2023; Liu et al. 2023), the d = 0 end of shortcut models.

E || v(x_t, t) - (x_1 - x_0) ||^2 on the straight path x_t = (1 - t) x_0 + t x_1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from shortcut_jax.objectives import base, common


@dataclasses.dataclass(frozen=True)
class FlowMatching(base.Objective):
    """Regression of the instantaneous velocity. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0  # w of v_uncond + w (v_cond - v_uncond); 1 = none, 0 = unconditional
    class_dropout: float = 0.1
    flow_time_grid: int = 0  # t on {0, 1/grid, ...}; 0 = continuous
    noise_floor: float = 0.0  # 1e-5 in the released code

    authors_code: ClassVar[Mapping[str, Any]] = {"flow_time_grid": 128, "noise_floor": 1e-5}

    @property
    def branches(self):
        return ("empirical",)

    def target_evaluations(self, batch_size):
        return 0.0

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del velocities, progress, num_shards  # the targets are empirical and every row is alike
        targets = common.empirical_rows(
            draw,
            batch.image,
            batch.label,
            flow_time_grid=self.flow_time_grid,
            noise_floor=self.noise_floor,
            class_dropout=1.0 if self.cfg_scale == 0.0 else self.class_dropout,
            null_label=self.null_label,
        )
        return targets, {"target_rms": common.rms(targets.target)}

    def guided(self, num_steps):
        return True  # a velocity may be guided at every step
