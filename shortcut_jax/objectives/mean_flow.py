"""MeanFlow (Geng et al. 2025), a method after the paper: the shortcut by its derivative.

The average velocity u(x_t, t, d) over [t, t + d] of a flow with velocity v obeys, with the end
t + d kept in place,

  u = v + d du/dt,    du/dt = v . grad_x u + du/dt - du/dd

the total derivative along (v, 1, -1), one Jacobian-vector product. Regressing u on the right-hand
side, without gradient in it, needs no half-steps, no EMA and no smallest step. (MeanFlow's own time
runs from data to noise: there u = v - (t - r) du/dt and the tangent is (v, 0, 1).)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shortcut_jax.objectives import base, common
from shortcut_jax.objectives.base import rows
from shortcut_jax.objectives.groups import Groups, on_groups


@dataclasses.dataclass(frozen=True)
class MeanFlow(base.Objective):
    """Flow matching at d = 0 and the MeanFlow identity at d > 0, in one batch."""

    null_label: int
    cfg_scale: float = 1.0  # w of the guided velocity in the targets (MeanFlow, section 4.2)
    class_dropout: float = 0.1
    mean_flow_fraction: float = 0.25  # share of rows with d > 0
    time_mean: float = 0.4  # t and t + d are the sorted sigmoids of two draws of N(mean, std^2)
    time_std: float = 1.0
    weight_power: float = 1.0  # rows are weighted by (squared error + 0.01)^-power

    uses_step_size: ClassVar[bool] = True
    differentiates_forward: ClassVar[bool] = True
    # The derivative in t of sinusoids of 1,000 t is too rough: training diverges. And d is any
    # number in (0, 1), not one of the few that "log2" tells apart.
    model_settings: ClassVar[Mapping[str, Any]] = {"time_scale": 1.0, "step_embedding": "d"}

    @property
    def branches(self):
        return ("empirical", "mean_flow")

    @property
    def _groups(self) -> Groups:
        return Groups.of(
            self.mean_flow_fraction,
            "objective.mean_flow_fraction",
            "MeanFlow uses 0.25 (for 0, choose objective=flow_matching)",
        )

    @property
    def _guides(self) -> bool:
        return self.cfg_scale not in (0.0, 1.0)

    def target_evaluations(self, batch_size):
        # A Jacobian-vector product is a forward pass and its derivative: 2.
        n = batch_size * self._groups.p // self._groups.q
        return 2.0 * n + batch_size * self._guides

    def validate(self, batch_size, num_shards):
        groups = self._groups
        groups.check(batch_size, num_shards, f"mean_flow_fraction={groups.p}/{groups.q}")

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del progress, num_shards
        groups = self._groups
        image, labels = groups.view(batch.image), groups.view(batch.label)
        labels = common.model_labels(labels, self.cfg_scale, self.null_label)
        labels = common.drop_labels(draw("dropout"), labels, self.class_dropout, self.null_label)

        # 1) t and t + d of the first rows of each group; the others have d = 0
        normal = jax.random.normal(draw("time"), (2, *labels.shape))
        times = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        is_jump = jnp.arange(groups.q) < groups.p
        t = times.min(0)  # the noisier of the two, of the other rows, too, as in MeanFlow's code
        d = jnp.where(is_jump, times.max(0) - t, 0.0)

        # 2) the path, and its velocity, guided by the network's own unconditional one
        x0 = jax.random.normal(draw("noise"), image.shape)
        x_t, v = common.interpolate(x0, image, t, 0.0)
        online = on_groups(velocities.online)
        if self._guides:
            null = jnp.full_like(labels, self.null_label)
            v_uncond = online(x_t, t, jnp.zeros_like(d), null)
            guided = v_uncond + self.cfg_scale * (v - v_uncond)
            v = jnp.where(rows(labels == self.null_label), v, guided)

        # 3) the identity
        p = groups.p
        x_p, t_p, d_p, v_p = (a[:, :p] for a in (x_t, t, d, v))
        one = jnp.ones_like(t_p)
        _, du_dt = jax.jvp(
            lambda x, t, d: online(x, t, d, labels[:, :p]), (x_p, t_p, d_p), (v_p, one, -one)
        )
        target = jax.lax.stop_gradient(v.at[:, :p].add(rows(d_p) * du_dt))

        targets = base.Targets(
            x_t=x_t,
            t=t,
            d=d,
            labels=labels,
            target=target,
            weight=jnp.ones_like(t),
            branch=jnp.broadcast_to(is_jump, t.shape).astype(jnp.int32),
        )
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), targets)
        return flat, {"target_rms": common.rms(target), "du_dt_rms": common.rms(du_dt)}

    def adaptive_weight(self, row_loss, pixels):
        # Of the squared error summed over pixels, which is what MeanFlow weights: the loss of a row
        # is about 1. Divided by the pixels, gradients on latents would be below Adam's epsilon.
        squared_error = pixels * row_loss
        return pixels * (squared_error + 0.01) ** -self.weight_power

    def guided(self, num_steps):
        return False  # the targets are

    def query_size(self, d):
        return d
