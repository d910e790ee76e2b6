"""Reflow (Liu et al. 2023): flow matching on the teacher's own pairs of noise and sample.

Two phases: a flow-matching teacher turns noises x_0 into samples x_1 in many Euler steps
(`shortcut_jax.pairs`), then a student regresses x_1 - x_0 on these pairs over all t. Paths
that the data cross become straight, which few steps can follow.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from shortcut_jax.objectives import base, common


@dataclasses.dataclass(frozen=True)
class Reflow(base.Objective):
    """Flow matching whose noise belongs to its image. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0  # of the teacher when it makes the pairs; the student is not guided
    num_pairs: int = 50_000  # the paper's number for CelebA-HQ
    pair_steps: int = 128  # Euler steps of the teacher for each pair
    flow_time_grid: int = 0  # t on {0, 1/grid, ...}; 0 = continuous
    noise_floor: float = 0.0  # 1e-5 in the released code
    class_dropout: float = 0.0  # 0.1 in the released code, which nothing then uses

    teacher: ClassVar = "pairs"
    authors_code: ClassVar[Mapping[str, Any]] = {
        "flow_time_grid": 128,
        "noise_floor": 1e-5,
        "class_dropout": 0.1,
    }

    @property
    def branches(self):
        return ("reflow",)

    def target_evaluations(self, batch_size):
        return 0.0  # the pairs are made once, before training

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del velocities, progress, num_shards
        assert batch.noise is not None, "reflow trains on pairs (shortcut_jax.pairs)"
        targets = common.empirical_rows(
            draw,
            batch.image,
            common.model_labels(batch.label, self.cfg_scale, self.null_label),
            x0=batch.noise,
            flow_time_grid=self.flow_time_grid,
            noise_floor=self.noise_floor,
            class_dropout=self.class_dropout,
            null_label=self.null_label,
        )
        return targets, {"target_rms": common.rms(targets.target)}

    def guided(self, num_steps):
        return False  # the pairs are
