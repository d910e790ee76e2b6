"""Samplers that add noise in every step: what noise sample i gets, and that it gets its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import sampling
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from shortcut_jax.objectives.diffusion import Diffusion, signal_levels
from shortcut_jax.parallel import sharding

CLASSES = 3
SHAPE = (1, 1, 2)
CONSISTENCY = ConsistencyTraining(null_label=CLASSES, sampler="renoise")
DDPM = Diffusion(null_label=CLASSES, sampler="ddpm")
OBJECTIVES = pytest.mark.parametrize(
    "objective", [CONSISTENCY, DDPM], ids=["consistency", "diffusion"]
)


# ---- the noise of a step -------------------------------------------------------------------------


@functools.cache
def step_noise(step, seed=0):
    return np.asarray(sampling.step_noise(seed, np.arange(2000), step, SHAPE))


@pytest.mark.parametrize("indices", [np.arange(4), np.array([1999, 7, 500, 8]), np.array([42])])
def test_noise_of_sample_i_does_not_depend_on_its_batch(indices):
    part = sampling.step_noise(0, indices, 3, SHAPE)
    np.testing.assert_array_equal(part, step_noise(3)[indices])


def test_noise_does_not_depend_on_whether_the_step_is_traced():
    traced = jax.jit(lambda i: sampling.step_noise(0, np.arange(4), i, SHAPE))(3)
    np.testing.assert_array_equal(traced, step_noise(3)[:4])


def test_noise_is_standard_normal():
    noise = step_noise(0)
    assert noise.shape == (2000, *SHAPE) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.064 and abs(noise.std() - 1) < 0.045  # 4 errors of 4,000
    assert abs(np.mean(np.abs(noise) < 0.6745) - 0.5) < 0.032


def test_noises_of_samples_steps_seeds_and_of_the_start_are_independent():
    start = np.asarray(sampling.initial(0, np.arange(2000), SHAPE, CLASSES)[0])
    draws = [start, step_noise(0), step_noise(1), step_noise(127), step_noise(0, seed=1)]
    # Each with each, also with that of the next sample and with the other component.
    columns = [a.ravel()[:-2] for a in draws] + [a.ravel()[2:] for a in draws]
    columns += [a[..., ::-1].ravel()[2:] for a in draws]
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.08


# ---- the compiled sampler ------------------------------------------------------------------------


def apply(params, x, t, d, labels):
    """A velocity towards 0, or a prediction of the noise."""
    return -x * params


@functools.cache
def make_sampler(objective, seed=0, scope="eval"):
    mesh = sharding.make_mesh(1, 1)
    return sampling.make_sampler(
        objective,
        apply,
        sharding.replicated(mesh),
        mesh,
        seed=seed,
        image_shape=SHAPE,
        num_classes=CLASSES,
        scope=scope,
    )


def samples(objective, indices, num_steps, params=0.3, **options):
    sample = make_sampler(objective, **options)
    images, labels = sample(jnp.asarray(params), np.asarray(indices), num_steps)
    return np.asarray(images), np.asarray(labels)


@OBJECTIVES
@pytest.mark.parametrize("num_steps", [1, 4])
def test_sample_i_does_not_depend_on_its_batch(objective, num_steps):
    images, labels = samples(objective, np.arange(8), num_steps)
    assert len(np.unique(images)) == images.size
    for indices in ([6, 1, 3, 0], [4, 5, 6, 7], [1, 1, 1, 1]):
        part, part_labels = samples(objective, indices, num_steps)
        np.testing.assert_allclose(part, images[indices], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(part_labels, labels[indices])


def test_consistency_sampling_adds_the_noise_of_its_step_each_time():
    indices, num_steps, params = np.arange(8), 4, 0.3
    x = np.asarray(sampling.initial(0, indices, SHAPE, CLASSES)[0], np.float64)
    for i in range(num_steps):
        end = x - (1 - i / num_steps) * params * x  # the predicted end of the path
        kept = (i + 1) / num_steps
        x = kept * end + (1 - kept) * np.asarray(sampling.step_noise(0, indices, i, SHAPE))
    images, _ = samples(CONSISTENCY, indices, num_steps, params)
    np.testing.assert_allclose(images, x, rtol=1e-4, atol=1e-5)


def test_ddpm_sampling_adds_the_noise_of_its_step_each_time():
    indices, params = np.arange(8), 0.3
    x = np.asarray(sampling.initial(0, indices, SHAPE, CLASSES)[0], np.float64)
    levels = np.append(signal_levels()[[999, 666, 333, 0]], 1.0)
    for i, (level, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        beta = 1 - level / after
        data = (x + np.sqrt(1 - level) * params * x) / np.sqrt(level)
        mean = np.sqrt(after) * beta * data + np.sqrt(1 - beta) * (1 - after) * x
        noise = np.asarray(sampling.step_noise(0, indices, i, SHAPE), np.float64)
        x = mean / (1 - level) + np.sqrt((1 - after) / (1 - level) * beta) * noise
    images, _ = samples(DDPM, indices, 4, params)
    np.testing.assert_allclose(images, x, rtol=1e-4, atol=1e-4)


@OBJECTIVES
@pytest.mark.parametrize("other", [{"seed": 1}, {"scope": "validation"}], ids=["seed", "scope"])
def test_another_seed_or_scope_gives_other_samples(objective, other):
    indices = np.arange(8)
    images, _ = samples(objective, indices, 4)
    others, _ = samples(objective, indices, 4, **other)
    assert (images != others).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"scope": "validation"}], ids=["seed", "scope"])
def test_another_seed_or_scope_gives_other_noise_to_a_step(other):
    # Where the velocity is 0, every point is its own predicted end: the first of two steps leads to
    # x0 / 2 + noise / 2, and the second stays there.
    indices = np.arange(8)

    def first_noise(**options):
        x0 = sampling.initial(
            options.get("seed", 0), indices, SHAPE, CLASSES, options.get("scope", "eval")
        )[0]
        images, _ = samples(CONSISTENCY, indices, 2, 0.0, **options)
        return 2 * images - np.asarray(x0)

    noise = first_noise()
    np.testing.assert_allclose(noise, sampling.step_noise(0, indices, 0, SHAPE), atol=1e-5)
    assert np.abs(noise - first_noise(**other)).mean() > 0.3
