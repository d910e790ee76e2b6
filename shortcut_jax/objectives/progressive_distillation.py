"""Progressive distillation (Salimans & Ho 2022) of a flow-matching teacher, size by size.

Training has log2 M equal stages. In stage i = 0, 1, ... the student learns steps of size
2d = 2^(i+1) / M from two steps of size d of its teacher, on t = 0, 2d, ..., 1 - 2d:

  s(x_t, t) -> (v(x_t, t) + v(x'_{t+d}, t+d)) / 2,    x'_{t+d} = x_t + d v(x_t, t)

At the end of a stage the EMA of the student becomes the teacher. After the last one the network
makes one step of size 1, and is no longer good at any other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import base, common


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillation(base.Objective):
    """A chain of students. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0  # guides the teacher of the first stage; later ones have it in them
    denoise_timesteps: int = 128  # M: the teacher of the first stage makes steps of 1/M
    noise_floor: float = 0.0  # 1e-5 in the released code
    bootstrap_clip: float = 0.0  # of the state between the teacher's steps; 4 in the released code

    teacher: ClassVar = "targets"
    promotes_student: ClassVar = True
    authors_code: ClassVar[Mapping[str, Any]] = {"noise_floor": 1e-5, "bootstrap_clip": 4.0}

    @property
    def num_stages(self):
        return self.denoise_timesteps.bit_length() - 1

    @property
    def branches(self):
        return tuple(f"distil_1_{2**level}" for level in range(self.num_stages))

    @property
    def _guides(self) -> bool:
        return self.cfg_scale not in (0.0, 1.0)

    def target_evaluations(self, batch_size):
        return 2.0 * batch_size * (1 + self._guides / self.num_stages)

    def validate(self, batch_size, num_shards):
        common.check_denoise_timesteps(self.denoise_timesteps)
        super().validate(batch_size, num_shards)

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del num_shards
        rows = batch.label.shape
        labels = common.model_labels(batch.label, self.cfg_scale, self.null_label)

        stage = progress.stage(self.num_stages)
        level = jnp.full(rows, self.num_stages - 1 - stage)  # size 2^-level of the step to learn
        d = jnp.ldexp(1.0, -(level + 1))  # of the teacher's two
        t = common.sample_grid_times(draw("time"), rows, jnp.ldexp(1.0, level))
        x0 = jax.random.normal(draw("noise"), batch.image.shape)
        x_t, _ = common.interpolate(x0, batch.image, t, self.noise_floor)

        target, scalars = common.two_step_target(
            self._teacher_step(velocities.teacher, stage, d, labels),
            x_t,
            t,
            d,
            clip_middle=self.bootstrap_clip,
            clip_target=0.0,
        )
        targets = base.Targets(
            x_t=x_t,
            t=t,
            d=2 * d,
            labels=labels,
            target=target,
            weight=jnp.ones(rows),
            branch=level,
        )
        return targets, scalars

    def _teacher_step(self, teacher, stage, d, labels):
        guided = base.guide(teacher, self.cfg_scale, self.null_label)

        def step(x, t):
            if not self._guides:  # cfg_scale = 0 has set the labels already
                return teacher(x, t, d, labels)
            # A branch, not a choice between two results: only the first stage pays for guidance.
            return jax.lax.cond(stage == 0, guided, teacher, x, t, d, labels)

        return step

    def refusal(self, num_steps):
        method = "progressive distillation"
        return common.not_a_power_of_two(num_steps, self.denoise_timesteps, method)

    def guided(self, num_steps):
        return False
