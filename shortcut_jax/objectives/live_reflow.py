"""Live reflow (the paper's own baseline): flow matching and reflow in one batch, at the same time.

One network learns two kinds of rows, told apart by d:

  empirical  s(x_t, t, 0) -> x_1 - x_0    the flow
  reflow     s(x_t, t, 1) -> x' - x_0     straight paths to x', where the flow takes x_0: its
                                          denoising by the network itself, anew in each step

Sampling in M steps follows the flow, in fewer steps the straight paths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import base, common
from shortcut_jax.objectives.groups import Groups


@dataclasses.dataclass(frozen=True)
class LiveReflow(base.Objective):
    """Flow and reflow in one batch. See docs/differences.md for the fields."""

    null_label: int
    cfg_scale: float = 1.0  # guides the denoising of reflow rows, and sampling in M steps
    class_dropout: float = 0.1  # of empirical rows
    denoise_timesteps: int = 128  # M: sampling in fewer steps follows the straight paths
    bootstrap_fraction: float = 0.25  # share of reflow rows; 1/8 in the released code
    reflow_steps: int = 128  # Euler steps of the denoising; 8 in the released code
    flow_time_grid: int = 0  # t on {0, 1/grid, ...}; 0 = continuous
    noise_floor: float = 0.0  # 1e-5 in the released code

    uses_step_size: ClassVar[bool] = True
    authors_code: ClassVar[Mapping[str, Any]] = {
        "bootstrap_fraction": 0.125,
        "reflow_steps": 8,
        "flow_time_grid": 128,
        "noise_floor": 1e-5,
    }

    @property
    def num_levels(self):
        return self.denoise_timesteps.bit_length() - 1

    @property
    def branches(self):
        return ("empirical", "reflow")

    @property
    def _groups(self) -> Groups:
        return Groups.of(
            self.bootstrap_fraction, "objective.bootstrap_fraction", "the released code uses 0.125"
        )

    def target_evaluations(self, batch_size):
        passes = 1 if self.cfg_scale in (0.0, 1.0) else 2
        return float(batch_size * self._groups.p // self._groups.q * self.reflow_steps * passes)

    def validate(self, batch_size, num_shards):
        common.check_denoise_timesteps(self.denoise_timesteps)
        groups = self._groups
        groups.check(batch_size, num_shards, f"bootstrap_fraction={groups.p}/{groups.q}")

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del progress, num_shards
        groups = self._groups
        image, labels = groups.view(batch.image), groups.view(batch.label)
        labels = common.model_labels(labels, self.cfg_scale, self.null_label)
        flow = common.empirical_rows(
            draw,
            image[:, groups.p :],
            labels[:, groups.p :],
            flow_time_grid=self.flow_time_grid,
            noise_floor=self.noise_floor,
            class_dropout=self.class_dropout,
            null_label=self.null_label,
        )
        x0 = jax.random.normal(draw("reflow/noise"), image[:, : groups.p].shape)
        end = self._denoise(velocities.online, x0, labels[:, : groups.p])
        reflow = common.empirical_rows(
            lambda name: draw(f"reflow/{name}"),
            end,
            labels[:, : groups.p],
            x0=x0,
            flow_time_grid=self.flow_time_grid,
            noise_floor=self.noise_floor,
            class_dropout=0.0,
            null_label=self.null_label,
        )
        # The straight path to the end of the flow has no noise floor in the released code either.
        reflow = reflow.replace(
            target=end - x0, d=jnp.ones_like(reflow.d), branch=jnp.ones_like(reflow.branch)
        )
        return groups.merge(reflow, flow), {"reflow_target_rms": common.rms(end - x0)}

    def _denoise(self, online, x0, labels):
        """Where the flow takes x0 [G, p, ...], in Euler steps of the online network."""
        flat = labels.reshape(-1)
        velocity = base.guide(online, self.cfg_scale, self.null_label)
        d = 1 / self.reflow_steps

        def body(i, x):
            return x + d * velocity(x, jnp.full(flat.shape, i * d), jnp.zeros(flat.shape), flat)

        end = jax.lax.fori_loop(0, self.reflow_steps, body, x0.reshape(-1, *x0.shape[2:]))
        return jax.lax.stop_gradient(end.reshape(x0.shape))

    def guided(self, num_steps):
        return num_steps >= self.denoise_timesteps  # straight paths have it in their targets

    def query_size(self, d):
        return jnp.where(jnp.round(1 / d) < self.denoise_timesteps, 1.0, 0.0)
