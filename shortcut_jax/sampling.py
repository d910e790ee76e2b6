"""Sampling: Algorithm 2 of the paper, for any objective, on any number of devices.

The noise and the label of sample i depend on i and the seed alone. From a trained model:

  model = sampling.load("runs/digits")
  images = model.sample(num_steps=4, labels=[3] * 8, seed=0)
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.metrics.protocols import quantise
from shortcut_jax.objectives import Objective
from shortcut_jax.objectives.base import Velocity, sampling_velocity
from shortcut_jax.parallel import sharding

if TYPE_CHECKING:
    from shortcut_jax import trained

# sample(params, indices [B] of the samples, num_steps) -> images [B,H,W,C] float32, labels [B]
Sampler = Callable[[Any, np.ndarray, int], tuple[jax.Array, jax.Array]]

# draw(request, seed) -> what B samples start from: noise [B,H,W,C], labels [B], and noise(i) that
# step i of a stochastic sampler adds
Draw = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]]


def initial(
    seed: jax.typing.ArrayLike,
    indices: jax.Array,
    image_shape: tuple[int, int, int],
    num_classes: int,
    scope: str = "eval",
) -> tuple[jax.Array, jax.Array]:
    """Noise [B, H, W, C] ~ N(0, I) and uniform labels [B] of the samples `indices` [B].

    Samples of another `scope` are other samples.
    """

    def one(i):
        noise = jax.random.normal(rng.stream(seed, f"{scope}/noise", i), image_shape)
        return noise, jax.random.randint(rng.stream(seed, f"{scope}/label", i), (), 0, num_classes)

    return jax.vmap(one)(indices)


def step_noise(
    seed: jax.typing.ArrayLike,
    indices: jax.Array,
    step: jax.Array,
    image_shape: tuple[int, int, int],
    scope: str = "eval",
) -> jax.Array:
    """N(0, I) [B, H, W, C] that sampling step `step` adds to the samples `indices` [B]."""

    def one(i):
        key = jax.random.fold_in(rng.stream(seed, f"{scope}/step_noise", i), step)
        return jax.random.normal(key, image_shape)

    return jax.vmap(one)(indices)


def integrate(
    objective: Objective,
    velocity: Velocity,
    x: jax.Array,
    labels: jax.Array,
    num_steps: jax.typing.ArrayLike,
    noise: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Moves x [B, H, W, C] from t = 0 to t = 1 in `num_steps` equal steps of the objective's rule.

    `num_steps` may be traced: one compiled program serves every number of steps. `noise(i)` is what
    step i of a stochastic sampler adds.
    """
    d = jnp.full(labels.shape, 1.0 / num_steps)

    def body(i, x):
        return objective.step(velocity, x, i * d, d, labels, lambda: noise(i))

    return jax.lax.fori_loop(0, num_steps, body, x)


def is_guided(objective: Objective, cfg_scale: float, num_steps: int) -> bool:
    """Whether each of `num_steps` steps mixes the velocities with and without labels.

    That takes two passes. With a scale of 0 or 1 it is one of the two, by one pass.
    """
    return cfg_scale not in (0.0, 1.0) and objective.guided(num_steps)


def make_sampler(
    objective: Objective,
    apply: Callable[..., jax.Array],
    params_sharding: Any,
    mesh: Mesh,
    *,
    seed: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    scope: str = "eval",
) -> Sampler:
    """A compiled sampler whose batch is split over the mesh.

    Args:
      objective: gives the rule of a step and whether it is guided.
      apply: network, apply(params, x, t, d, labels).
      params_sharding: tree of shardings of the parameters.
      mesh: the devices; the batch must be a multiple of their number.
      seed: of noise and labels.
      image_shape: (H, W, C).
      num_classes: labels are drawn uniformly from [0, num_classes).
      scope: see `initial`.
    """

    def draw(indices, seed):
        x, labels = initial(seed, indices, image_shape, num_classes, scope)
        return x, labels, lambda i: step_noise(seed, indices, i, image_shape, scope)

    run = make_program(objective, apply, params_sharding, mesh, draw)
    return lambda params, indices, num_steps: run(
        params, indices.astype(np.uint32), seed, num_steps
    )


def make_program(
    objective: Objective,
    apply: Callable[..., jax.Array],
    params_sharding: Any,
    mesh: Mesh,
    draw: Draw,
) -> Callable[[Any, Any, int, int], tuple[jax.Array, jax.Array]]:
    """As `make_sampler`, for samples that start from what `draw` makes of a request.

    Returns:
      run(params, request, seed, num_steps) -> images [B, H, W, C] float32, labels [B]. The request
      is a tree of host arrays [B], of all rows on every process.
    """
    rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    @functools.cache  # guidance doubles the rows: another program, which most runs never need
    def program(guided: bool):
        def sample(params, request, seed, num_steps):
            velocity = sampling_velocity(objective, functools.partial(apply, params), guided)
            x, labels, noise = draw(request, seed)
            return integrate(objective, velocity, x, labels, num_steps, noise), labels

        return jax.jit(
            sample,
            in_shardings=(params_sharding, rows, replicated, replicated),
            out_shardings=(rows, rows),
        )

    def run(params, request, seed, num_steps):
        own = sharding.own_rows(len(jax.tree.leaves(request)[0]), mesh)
        local = jax.tree.map(lambda a: a[own], request)
        return program(is_guided(objective, objective.cfg_scale, num_steps))(
            params, sharding.to_global(local, rows), np.uint32(seed), np.int32(num_steps)
        )

    return run


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    params: str = "ema",
    autoencoder: str | os.PathLike[str] | None = None,
) -> "trained.Model":
    """The trained model of a workdir; see `trained.load`."""
    from shortcut_jax import trained  # which needs this module

    return trained.load(workdir, step, params, autoencoder)


def check_cfg_scale(
    section: Mapping[str, Any], objective: Objective, cfg_scale: float, num_steps: int
) -> None:
    """Refuses a scale of guidance that a model cannot be sampled with.

    Args:
      section: objective of the config it was trained with.
      objective: built from it.
      cfg_scale: asked for.
      num_steps: number of sampling steps.

    Raises:
      UserError: it is not the scale of the training, and another one is not possible.
    """
    if cfg_scale == section["cfg_scale"]:
        return
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        why = "it is neither 0 (no labels) nor 1 (no guidance) nor another positive number"
    elif section["cfg_scale"] == 0:
        why = "the model was trained without labels"
    elif not objective.guided(num_steps):
        why = f"samples in {num_steps} steps are not guided: the guidance is in the weights"
    elif cfg_scale != 1 and section["class_dropout"] == 0:
        why = "guidance needs the null label, never trained (objective.class_dropout=0)"
    else:
        return
    raise UserError(
        f"cfg_scale={cfg_scale} is not possible for this {section['name']} model, because {why}; "
        f"expected {section['cfg_scale']}, its objective.cfg_scale: leave cfg_scale out."
    )


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, clipped, rounded to the nearest."""
    return quantise("round", images)
