"""Diffusion: DDPM's schedule and targets, and one step of DDPM and DDIM, against numpy in float64.

Rows may be at different noise levels and take steps of different sizes, so one call of `step` shows
all steps of a sampler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng, sampling
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.diffusion import Diffusion, signal_levels
from tests import toys

N = 1024
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)

BETAS = np.array([1e-4 + s * (0.02 - 1e-4) / 999 for s in range(1000)])
ALPHA_BARS = np.exp(np.cumsum(np.log1p(-BETAS)))  # of the definition, not by a product


def unused(*args):
    raise AssertionError("nothing may ask for this")


def make_batch(scale=1.0):
    return toys.make_batch(N, SHAPE, scale)


def make_targets(*, scale=1.0, seed=0, index=0, **settings):
    objective = Diffusion(null_label=NULL, **settings)
    draw = rng.draws(seed, "train", index)
    targets, _ = objective.targets(draw, make_batch(scale), Velocities(unused, unused), PROGRESS)
    return jax.tree.map(np.asarray, targets)


@functools.cache
def sixteen_steps():
    """The rows of 16 steps, and the images they are made of."""
    steps = [make_targets(index=index) for index in range(16)]
    rows = jax.tree.map(lambda *a: np.concatenate(a), *steps)
    return rows, np.tile(np.asarray(make_batch().image), (16, 1, 1, 1))


def noise_level(t):
    """s of the network's time t = 1 - (s + 1) / 1000."""
    s = np.rint(1000 * (1 - np.asarray(t, np.float64))).astype(int) - 1
    np.testing.assert_allclose(t, 1 - (s + 1) / 1000, atol=1e-6)
    return s


# ---- schedule and targets ------------------------------------------------------------------------


def test_schedule_is_ddpms_linear_one():
    levels = signal_levels()
    assert levels.shape == (1000,) and levels.dtype == np.float64
    np.testing.assert_allclose(levels, ALPHA_BARS, rtol=1e-10)
    np.testing.assert_allclose(levels[0], 0.9999, rtol=1e-12)
    np.testing.assert_allclose(levels[1], 0.9999 * (1 - 1e-4 - 0.0199 / 999), rtol=1e-12)
    np.testing.assert_allclose(levels[999], 4.036e-5, rtol=1e-4)


def test_rows_are_images_at_a_noise_level_and_regress_the_noise():
    targets, images = sixteen_steps()
    level = toys.per_row(ALPHA_BARS[noise_level(targets.t)])
    expected = np.sqrt(level) * images + np.sqrt(1 - level) * targets.target
    np.testing.assert_allclose(targets.x_t, expected, rtol=1e-5, atol=2e-6)


def test_ends_of_the_schedule_by_hand():
    targets, images = sixteen_steps()
    s = noise_level(targets.t)
    assert {0, 999} <= set(s)
    clean, noisy = s == 0, s == 999
    np.testing.assert_allclose(targets.t[clean], 0.999, rtol=1e-6)
    np.testing.assert_array_equal(targets.t[noisy], 0)
    # sqrt(0.9999) = 0.99995 of the image and sqrt(0.0001) = 0.01 of the noise, and
    # sqrt(4.036e-5) = 0.006353 of the image and sqrt(1 - 4.036e-5) = 0.99998 of the noise.
    expected = 0.99995 * images + 0.01 * targets.target
    np.testing.assert_allclose(targets.x_t[clean], expected[clean], atol=1e-5)
    expected = 0.006353 * images + 0.99998 * targets.target
    np.testing.assert_allclose(targets.x_t[noisy], expected[noisy], atol=1e-5)


def test_all_noise_levels_are_equally_likely():
    counts = np.bincount(noise_level(sixteen_steps()[0].t), minlength=1000)
    assert len(counts) == 1000
    hundreds = counts.reshape(10, 100).sum(1)
    expected = 16 * N / 10
    assert ((hundreds - expected) ** 2 / expected).sum() < 27.9  # 9 degrees, p = 0.001
    assert counts.min() > 0  # of 16 expected


def test_fields_of_every_row():
    targets = make_targets()
    toys.assert_fields(targets, N, SHAPE)
    assert (targets.d == 0).all() and (targets.weight == 1).all() and (targets.branch == 0).all()
    objective = Diffusion(null_label=NULL)
    assert objective.branches == ("empirical",) and not objective.uses_step_size
    assert objective.target_evaluations(64) == 0  # `unused` shows that no network is asked


def test_noise_is_standard_normal_and_independent_of_levels_images_and_dropped_labels():
    targets = make_targets(class_dropout=0.3)
    noise = targets.target
    assert abs(noise.mean()) < 0.08 and abs(noise.std() - 1) < 0.06
    assert len(np.unique(noise)) > 0.99 * noise.size
    image = np.asarray(make_batch().image)[:, 0, 0, 0]
    others = [targets.t, targets.labels == NULL, image]
    for component in (noise.ravel()[:N], noise[:, 0, 0, 0]):
        correlations = np.corrcoef([component, *others])
        assert np.abs(correlations - np.eye(4)).max() < 0.14


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_labels_are_dropped_with_the_probability(probability):
    labels = make_targets(class_dropout=probability).labels
    dropped = labels == NULL
    tolerance = 4 * (probability * (1 - probability) / N) ** 0.5
    assert abs(dropped.mean() - probability) <= tolerance
    np.testing.assert_array_equal(labels[~dropped], np.arange(N)[~dropped])


def test_cfg_scale_0_trains_the_null_label_alone():
    assert (make_targets(cfg_scale=0.0, class_dropout=0.0).labels == NULL).all()


def test_targets_are_a_function_of_seed_and_step():
    one = make_targets(class_dropout=0.5)
    jax.tree.map(np.testing.assert_array_equal, make_targets(class_dropout=0.5), one)
    for other in ({"index": 1}, {"seed": 1}):
        targets = make_targets(class_dropout=0.5, **other)
        for name in ("target", "t", "labels"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


# ---- one step of the sampler ---------------------------------------------------------------------


class Spy:
    """Predicts the noise 0.5 x - 0.2 and notes what it was asked."""

    def __call__(self, x, t, d, labels):
        self.x, self.t, self.d, self.labels = (np.asarray(a) for a in (x, t, d, labels))
        return self.predict(x)

    @staticmethod
    def predict(x):
        return 0.5 * x - 0.2


def all_steps(num_steps):
    """x, t and d of every step of a sampler, a row each, as `integrate` gives them."""
    d = np.full(num_steps, 1 / num_steps, np.float32)
    x = np.random.default_rng(1).normal(size=(num_steps, *SHAPE)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.arange(num_steps, dtype=np.float32) * d), jnp.asarray(d)


def respaced(num_steps):
    """Noise levels that `num_steps` steps visit: from 999 to 0, evenly."""
    return np.rint(np.linspace(999, 0, num_steps)).astype(int)


def run_step(sampler, num_steps, noise=None):
    """x before and after each step, the noise each adds, and what the network was asked."""
    x, t, d = all_steps(num_steps)
    spy = Spy()
    labels = jnp.arange(num_steps, dtype=jnp.int32)
    if noise is None:
        noise = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    objective = Diffusion(null_label=NULL, sampler=sampler)
    draw = unused if sampler == "ddim" else lambda: jnp.asarray(noise)
    end = objective.step(spy, x, t, d, labels, draw)
    return np.asarray(x, np.float64), np.asarray(end), noise.astype(np.float64), spy


def test_steps_visit_noise_levels_from_999_evenly_down_to_0():
    # All numbers of steps at once, as rows that are at different steps.
    counts = np.repeat(np.arange(1, 1001), np.arange(1, 1001))
    index = np.concatenate([np.arange(n) for n in range(1, 1001)])
    d = (1 / counts).astype(np.float32)
    t, spy = index.astype(np.float32) * d, Spy()
    x = jnp.zeros((len(d), 1, 1, 1))
    Diffusion(null_label=NULL).step(
        spy, x, jnp.asarray(t), jnp.asarray(d), jnp.zeros(len(d), jnp.int32), lambda: x
    )
    s = noise_level(spy.t)
    even = 999 * (1 - index / np.maximum(counts - 1, 1))
    assert np.abs(s - even).max() < 0.501
    assert (s[index == 0] == 999).all()
    assert (s[(index == counts - 1) & (counts > 1)] == 0).all()


@pytest.mark.parametrize(
    ("num_steps", "levels"), [(1, [999]), (2, [999, 0]), (4, [999, 666, 333, 0])]
)
def test_few_steps_by_hand(num_steps, levels):
    _, _, _, spy = run_step("ddpm", num_steps)
    np.testing.assert_array_equal(noise_level(spy.t), levels)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 128, 1000])
def test_the_network_is_asked_once_at_its_level_with_size_0_and_the_label(sampler, num_steps):
    x, _, _, spy = run_step(sampler, num_steps)
    np.testing.assert_array_equal(noise_level(spy.t), respaced(num_steps))
    np.testing.assert_array_equal(spy.x, x)
    np.testing.assert_array_equal(spy.d, 0)
    np.testing.assert_array_equal(spy.labels, np.arange(num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 128, 1000])
def test_ddpm_step_is_the_posterior_of_the_respaced_chain(num_steps):
    x, end, noise, _ = run_step("ddpm", num_steps)
    # The chain of fewer levels, from data to noise, has betas of its own (Ho et al., eq. 7).
    alpha_bar = ALPHA_BARS[respaced(num_steps)][::-1]
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    data = (x - toys.per_row(np.sqrt(1 - alpha_bar))[::-1] * Spy.predict(x)) / toys.per_row(
        np.sqrt(alpha_bar)
    )[::-1]
    of_data = np.sqrt(before) * beta / (1 - alpha_bar)
    of_x = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    variance = (1 - before) / (1 - alpha_bar) * beta
    of_data, of_x, deviation = (toys.per_row(a[::-1]) for a in (of_data, of_x, np.sqrt(variance)))
    expected = of_data * data + of_x * x + deviation * noise
    np.testing.assert_allclose(end, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 128, 1000])
def test_ddim_step_keeps_the_predicted_noise_and_data(num_steps):
    x, end, _, _ = run_step("ddim", num_steps)
    level = toys.per_row(ALPHA_BARS[respaced(num_steps)])
    next_level = np.append(level[1:], np.ones((1, 1, 1, 1)), axis=0)
    data = (x - np.sqrt(1 - level) * Spy.predict(x)) / np.sqrt(level)
    expected = np.sqrt(next_level) * data + np.sqrt(1 - next_level) * Spy.predict(x)
    np.testing.assert_allclose(end, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_last_step_returns_the_predicted_data(sampler):
    for num_steps in (1, 4):
        x, end, noise, _ = run_step(sampler, num_steps)
        level = ALPHA_BARS[999 if num_steps == 1 else 0]
        data = (x[-1] - np.sqrt(1 - level) * Spy.predict(x[-1])) / np.sqrt(level)
        np.testing.assert_allclose(end[-1], data, rtol=1e-4, atol=1e-5)
        _, again, _, _ = run_step(sampler, num_steps, noise=noise + 100)
        np.testing.assert_allclose(again[-1], end[-1], rtol=1e-5)


# ---- whole samples -------------------------------------------------------------------------------

INDICES = np.arange(2000, dtype=np.uint32)
MEAN, DEVIATION = 0.7, 0.3  # of Gaussian data, whose noise can be predicted exactly


def exact_noise(x, t, d, labels):
    """E[noise | x_s] for data N(MEAN, DEVIATION^2)."""
    s = jnp.round(1000 * (1 - t)).astype(jnp.int32) - 1
    level = toys.per_row(jnp.asarray(ALPHA_BARS, jnp.float32)[s])
    centred = x - jnp.sqrt(level) * MEAN
    return jnp.sqrt(1 - level) * centred / (level * DEVIATION**2 + 1 - level)


@functools.cache
def integrator(sampler):
    """`integrate` as the sampler calls it: compiled once for all numbers of steps."""
    noise = unused if sampler == "ddim" else lambda i: sampling.step_noise(0, INDICES, i, SHAPE)
    objective = Diffusion(null_label=NULL, sampler=sampler)
    return jax.jit(functools.partial(sampling.integrate, objective, exact_noise, noise=noise))


def test_many_ddim_steps_give_gaussian_data_its_mean_and_deviation():
    # The map from noise to sample is affine, so two points show mean and deviation.
    x, labels = jnp.stack([jnp.zeros(SHAPE), jnp.ones(SHAPE)]), jnp.zeros(2, jnp.int32)
    for num_steps, tolerance in ((128, 0.02), (1000, 0.005)):
        origin, one = np.asarray(integrator("ddim")(x, labels, num_steps))[:, 0, 0, 0]
        assert abs(origin - MEAN) < tolerance
        assert abs(one - origin - DEVIATION) < tolerance


def test_many_ddpm_steps_give_gaussian_data_its_mean_and_deviation():
    x, labels = sampling.initial(0, INDICES, SHAPE, 1)
    end = np.asarray(integrator("ddpm")(x, labels, 1000))
    assert abs(end.mean() - MEAN) < 0.02  # 4 standard errors of 4,000 values
    assert abs(end.std() - DEVIATION) < 0.02


def test_sampling_rules():
    objective = Diffusion(null_label=NULL, cfg_scale=2.0)
    for steps in (1, 3, 128, 1000):
        objective.check_steps(steps)
        assert objective.guided(steps)
    for steps in (0, -2, 1001):
        with pytest.raises(UserError, match=f"eval.steps holds {steps};"):
            objective.check_steps(steps)
    assert objective.sampler == "ddpm"
