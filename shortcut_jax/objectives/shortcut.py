"""Shortcut models (Frans, Hafner, Levine, Abbeel; ICLR 2025).

A shortcut s(x_t, t, d) is the average velocity of the flow over [t, t + d], so that
x_{t+d} = x_t + d s(x_t, t, d). One network learns it for every d at once, from two kinds of rows:

  empirical   s(x_t, t, 0)  -> x_1 - x_0                                   (flow matching)
  bootstrap   s(x_t, t, 2d) -> (s(x_t, t, d) + s(x'_{t+d}, t+d, d)) / 2    (self-consistency)
              x'_{t+d} = x_t + d s(x_t, t, d)

The time of the second half-step is t + d: the paper's displayed equation prints t there, its
Algorithm 1 and the released code use t + d.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.objectives import base, common
from shortcut_jax.objectives.base import rows
from shortcut_jax.objectives.groups import Groups, on_groups


@dataclasses.dataclass(frozen=True)
class Shortcut(base.Objective):
    """Flow matching and self-consistency in one batch. See docs/differences.md for every switch."""

    null_label: int
    cfg_scale: float = 1.0  # w of v_uncond + w (v_cond - v_uncond); 1 = none, 0 = unconditional
    class_dropout: float = 0.1  # of empirical rows
    denoise_timesteps: int = 128  # M: the smallest step is 1/M, sizes are 1/M, 2/M, ..., 1
    bootstrap_fraction: float = 0.25  # k: share of rows with self-consistency targets
    bootstrap_params: Literal["ema", "online"] = "ema"  # who answers the two half-steps
    bootstrap_cfg: bool = True  # guide the half-steps of size 1/M (asked as d = 0) by cfg_scale
    step_size_sampling: Literal["random", "systematic", "stratified"] = "random"  # see _levels
    flow_time_grid: int = 0  # t of empirical rows on {0, 1/grid, ...}; 0 = continuous
    noise_floor: float = 0.0  # 1e-5 in the released code
    bootstrap_clip: float = 0.0  # clip of mid-point and target; 0 = none, 4 in the released code
    bootstrap_label_dropout: bool = False  # drop labels of bootstrap rows, too
    reuse_images: bool = False  # released code: bootstrap rows share images with empirical rows

    uses_step_size: ClassVar[bool] = True
    authors_code: ClassVar[Mapping[str, Any]] = {
        "bootstrap_fraction": 0.125,
        "step_size_sampling": "stratified",
        "flow_time_grid": 128,
        "noise_floor": 1e-5,
        "bootstrap_clip": 4.0,
        "reuse_images": True,
    }

    # ------------------------------------------------------------------ the split of the batch

    @property
    def num_levels(self) -> int:
        """log2 M: bootstrap rows learn the sizes 2^-level, level = 0 ... num_levels - 1."""
        return self.denoise_timesteps.bit_length() - 1

    @property
    def branches(self):
        return ("empirical", *(f"bootstrap_1_{2**level}" for level in range(self.num_levels)))

    def target_evaluations(self, batch_size):
        n = batch_size * self._groups.p // self._groups.q
        return 2.0 * (n + self._most_smallest(n))

    @property
    def _groups(self) -> Groups:
        return Groups.of(
            self.bootstrap_fraction,
            "objective.bootstrap_fraction",
            "the paper uses 0.25 (for 0, choose objective=flow_matching)",
        )

    @property
    def _stratified(self) -> bool:
        return self.step_size_sampling == "stratified"

    @property
    def _systematic(self) -> bool:
        return self.step_size_sampling == "systematic"

    @property
    def _guides(self) -> bool:
        return self.bootstrap_cfg and self.cfg_scale not in (0.0, 1.0)

    def _most_smallest(self, n: int, num_shards: int = 1) -> int:
        """The rows of the smallest size that a shard of n bootstrap rows has at most, if guided."""
        if not self._guides:
            return 0
        in_shard = n // num_shards
        if self._stratified:
            smallest = stratified_levels(n, self.num_levels) == self.num_levels - 1
            return int(smallest.reshape(num_shards, -1).sum(1).max())
        return math.ceil(in_shard / self.num_levels) if self._systematic else in_shard

    def validate(self, batch_size, num_shards):
        common.check_denoise_timesteps(self.denoise_timesteps)
        groups = self._groups
        # Fewer bootstrap rows than sizes: floor(rows / sizes) = 0 and every row would be d = 1, a
        # target whose half-steps are never trained (github.com/kvfrans/shortcut-models #11).
        what = (
            f"bootstrap_fraction={groups.p}/{groups.q}, {self.num_levels} step sizes "
            f"({self.step_size_sampling})"
        )
        groups.check(batch_size, num_shards, what, self.num_levels if self._stratified else 1)

    # ------------------------------------------------------------------ targets (Algorithm 1)

    def targets(self, draw, batch, velocities, progress, num_shards=1):
        del progress
        # The first p rows of each group of q bootstrap.
        groups = self._groups
        p, q = groups.p, groups.q
        image, label = groups.view(batch.image), groups.view(batch.label)
        label = common.model_labels(label, self.cfg_scale, self.null_label)
        flow_rows = slice(0, q - p) if self.reuse_images else slice(p, q)

        flow = common.empirical_rows(
            draw,
            image[:, flow_rows],
            label[:, flow_rows],
            flow_time_grid=self.flow_time_grid,
            noise_floor=self.noise_floor,
            class_dropout=self.class_dropout,
            null_label=self.null_label,
        )
        velocity = velocities.ema if self.bootstrap_params == "ema" else velocities.online
        boot, scalars = self._bootstrap(draw, image[:, :p], label[:, :p], velocity, num_shards)
        return groups.merge(boot, flow), scalars

    def _bootstrap(self, draw, x1, labels, velocity, num_shards):
        """Rows [G, p]: two half-steps of the target network, averaged."""
        shape = labels.shape
        if self.bootstrap_label_dropout:
            key = draw("bootstrap/dropout")
            labels = common.drop_labels(key, labels, self.class_dropout, self.null_label)

        # 1) the size 2^-level of the step to learn; its two half-steps have size d
        level = self._levels(draw("bootstrap/step_size"), labels.size).reshape(shape)
        d = jnp.ldexp(1.0, -(level + 1))  # exact on every back end, as 2.0**level need not be

        # 2) t, on multiples of the step to learn: {0, 2d, ..., 1 - 2d}
        t = common.sample_grid_times(draw("bootstrap/time"), shape, jnp.ldexp(1.0, level))

        # 3) x_t on the straight path
        x0 = jax.random.normal(draw("bootstrap/noise"), x1.shape)
        x_t, _ = common.interpolate(x0, x1, t, self.noise_floor)

        # 4) two half-steps, the second from where the first one led, not from the data
        half_step = self._half_step(velocity, num_shards)
        target, scalars = common.two_step_target(
            lambda x, t: half_step(x, t, d, labels),
            x_t,
            t,
            d,
            clip_middle=self.bootstrap_clip,
            clip_target=self.bootstrap_clip,
        )
        targets = base.Targets(
            x_t=x_t,
            t=t,
            d=2 * d,
            labels=labels,
            target=target,
            weight=jnp.ones(shape),
            branch=1 + level,
        )
        return targets, scalars

    def _levels(self, key, n: int) -> jax.Array:
        """Levels [n]. Each is as likely as the others for every row, unless "stratified"."""
        if self._stratified:
            return jnp.asarray(stratified_levels(n, self.num_levels))
        if self._systematic:
            # Systematic sampling: all levels in turn, from one drawn at random. Of any num_levels
            # rows one is of the smallest size, so that guidance needs few unconditional rows.
            return (
                jnp.arange(n) + jax.random.randint(key, (), 0, self.num_levels)
            ) % self.num_levels
        return jax.random.randint(key, (n,), 0, self.num_levels)

    def _half_step(self, velocity, num_shards):
        """The target network on rows [G, p], guided where the half-step is the smallest, 1/M.

        Guidance holds for velocities, not for longer jumps, so only those rows are guided; larger
        sizes inherit it through their targets. Their unconditional twins ride along in the same
        pass and in the same shard: as many as it may need, its first rows of the smallest size.
        """

        ask = on_groups(velocity)

        def query(x, t, d, labels):
            return ask(x, t, self.query_size(d), labels)

        def guided_query(x, t, d, labels):
            most = self._most_smallest(labels.size, num_shards)
            shards = [a.reshape(num_shards, -1, *a.shape[2:]) for a in (x, t, d, labels)]
            smallest = self._is_smallest(shards[2])  # [S, n / S]
            chosen = jnp.argsort(~smallest, axis=1, stable=True)[:, :most]
            twins = [_take(a, chosen) for a in shards[:3]] + [
                jnp.full_like(chosen, self.null_label)
            ]
            v = query(*(jnp.concatenate(ab, axis=1) for ab in zip(shards, twins, strict=True)))
            v_cond, v_twins = v[:, : smallest.shape[1]], v[:, smallest.shape[1] :]
            v_uncond = _take(v_twins, jnp.cumsum(smallest, axis=1) - 1)  # of other rows: any
            v_guided = v_uncond + self.cfg_scale * (v_cond - v_uncond)
            return jnp.where(rows(smallest), v_guided, v_cond).reshape(x.shape)

        return guided_query if self._guides else query

    # ------------------------------------------------------------------ sampling (Algorithm 2)

    def refusal(self, num_steps):
        return common.not_a_power_of_two(num_steps, self.denoise_timesteps, "a shortcut model")

    def guided(self, num_steps):
        return num_steps >= self.denoise_timesteps  # only the d = 0 network is not yet guided

    def query_size(self, d):
        # A step of 1/M is taken with the instantaneous velocity, which is what was trained.
        return jnp.where(self._is_smallest(d), 0.0, d)

    def _is_smallest(self, d):
        return d < 1.5 / self.denoise_timesteps  # sizes are powers of two: safe from rounding


def stratified_levels(n: int, num_levels: int) -> np.ndarray:
    """The released code's step sizes: floor(n / num_levels) rows of each, the rest of size 1.

    Args:
      n: number of bootstrap rows, at least num_levels.
      num_levels: log2 M.

    Returns:
      Levels [n] (size 2^-level). The rows of the smallest size are spread evenly, so that every
      device gets its share of guided rows.
    """
    each = n // num_levels
    smallest = np.arange(each) * n // each
    levels = np.zeros(n, np.int32)
    others = np.setdiff1d(np.arange(n), smallest)
    levels[smallest] = num_levels - 1
    levels[others[: each * (num_levels - 2)]] = np.repeat(np.arange(num_levels - 2, 0, -1), each)
    return levels


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    """a [S, m, ...] at index [S, c], each shard by itself: [S, c, ...]."""
    return jnp.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis=1)
