"""Sampling: Algorithm 2 of the paper, for any objective, on any number of devices.

The noise and the label of sample i depend on i and the seed alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from shortcut_jax import rng, sharding
from shortcut_jax.objectives import Objective
from shortcut_jax.objectives.base import Velocity, sampling_velocity

# sample(params, indices [B] of the samples, num_steps) -> images [B,H,W,C] float32, labels [B]
Sampler = Callable[[Any, np.ndarray, int], tuple[jax.Array, jax.Array]]


def initial(
    seed: int,
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
    seed: int,
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
    rows = sharding.batch_sharding(mesh)

    @functools.cache  # guidance doubles the rows: another program, which most runs never need
    def program(guided: bool):
        def sample(params, indices, num_steps):
            velocity = sampling_velocity(objective, functools.partial(apply, params), guided)
            x, labels = initial(seed, indices, image_shape, num_classes, scope)

            def noise(i):
                return step_noise(seed, indices, i, image_shape, scope)

            return integrate(objective, velocity, x, labels, num_steps, noise), labels

        return jax.jit(
            sample,
            in_shardings=(params_sharding, rows, sharding.replicated(mesh)),
            out_shardings=(rows, rows),
        )

    def run(params, indices, num_steps):
        local = indices.reshape(jax.process_count(), -1)[jax.process_index()]
        global_indices = sharding.to_global(local.astype(np.uint32), rows)
        return program(objective.guided(num_steps))(params, global_indices, np.int32(num_steps))

    return run


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, clipped, rounded to the nearest."""
    return np.clip(np.rint((images + 1.0) * 127.5), 0, 255).astype(np.uint8)
