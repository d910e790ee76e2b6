"""Sampling with velocities whose solution is known, and guidance by its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import sampling
from shortcut_jax.objectives.base import guide, sampling_velocity
from shortcut_jax.objectives.flow_matching import FlowMatching
from shortcut_jax.objectives.shortcut import Shortcut
from shortcut_jax.parallel import sharding
from tests import toys

NULL = 10
SHAPE = (2, 2, 1)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
SHORTCUT, FLOW = Shortcut(null_label=NULL), FlowMatching(null_label=NULL)


def start(n=3):
    """x and labels."""
    x = np.random.default_rng(0).normal(size=(n, *SHAPE)).astype(np.float32)
    return jnp.asarray(x), jnp.arange(n, dtype=jnp.int32)


@functools.cache
def integrator(objective, velocity):
    """integrate as the sampler calls it: compiled once for all numbers of steps."""
    return jax.jit(functools.partial(sampling.integrate, objective, velocity, noise=no_noise))


def no_noise(*step):
    raise AssertionError("a deterministic sampler draws no noise")


# ---- the rule of a step, over the whole of [0, 1] ------------------------------------------------


def constant(x, t, d, labels):
    return jnp.full_like(x, 3.0) + toys.per_row(labels)


@pytest.mark.parametrize("objective", [SHORTCUT, FLOW], ids=["shortcut", "flow_matching"])
def test_a_constant_velocity_is_exact_in_any_number_of_steps(objective):
    x, labels = start()
    for num_steps in (1, 4):
        end = integrator(objective, constant)(x, labels, num_steps)
        np.testing.assert_allclose(end, x + 3 + toys.per_row(labels), rtol=1e-6)


def decay(x, t, d, labels):
    return -x


@pytest.mark.parametrize(
    ("objective", "step_counts"),
    [(SHORTCUT, POWERS), (FLOW, (1, 2, 3, 10, 100))],
    ids=["shortcut", "flow_matching"],
)
def test_exponential_decay_is_eulers(objective, step_counts):
    x, labels = start()
    for num_steps in step_counts:
        end = integrator(objective, decay)(x, labels, num_steps)
        expected = np.asarray(x, np.float64) * (1 - 1 / num_steps) ** num_steps
        np.testing.assert_allclose(end, expected, rtol=2e-5, atol=1e-7)


def exact_shortcut(x, t, d, labels):
    """The average velocity over [t, t + d] of dx/dt = a x + b t; d = 0 stands for 1/128."""
    a, b = -1.5, 2.0
    t, d = toys.per_row(t), toys.per_row(jnp.where(d == 0, 1 / 128, d))
    end = jnp.exp(a * d) * (x + b * t / a + b / a**2) - b * (t + d) / a - b / a**2
    return (end - x) / d


def test_exact_shortcuts_lead_to_the_same_end_in_any_number_of_steps():
    x, labels = start()
    a, b = -1.5, 2.0
    expected = np.exp(a) * (np.asarray(x, np.float64) + b / a**2) - b / a - b / a**2
    for num_steps in POWERS:
        end = integrator(SHORTCUT, exact_shortcut)(x, labels, num_steps)
        np.testing.assert_allclose(end, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "num_steps"),
    [(SHORTCUT, 1), (SHORTCUT, 8), (SHORTCUT, 128), (FLOW, 5)],
)
def test_step_i_is_asked_at_i_over_n_with_size_1_over_n(objective, num_steps):
    asked = []

    def velocity(x, t, d, labels):
        jax.debug.callback(lambda *a: asked.append(a), t, d, ordered=True)
        return jnp.zeros_like(x)

    x, labels = start()
    end = integrator(objective, velocity)(x, labels, num_steps)
    jax.block_until_ready(end)
    jax.effects_barrier()
    times, sizes = np.array(asked).swapaxes(0, 1)
    expected = np.broadcast_to(np.arange(num_steps)[:, None] / num_steps, (num_steps, 3))
    np.testing.assert_allclose(times, expected, rtol=1e-6)
    # d = 0 at the smallest size, which is trained as the instantaneous velocity.
    size = 0 if num_steps == 128 or objective is FLOW else 1 / num_steps
    np.testing.assert_array_equal(sizes, np.full_like(sizes, size))


def test_rows_may_be_at_different_times_and_take_steps_of_different_sizes():
    def velocity(x, t, d, labels):
        return x + toys.per_row(10 * t + 100 * d + 1000 * labels)

    x, labels = start()
    t, d = jnp.asarray([0.0, 0.5, 0.75]), jnp.asarray([1.0, 0.25, 1 / 128])
    end = SHORTCUT.step(velocity, x, t, d, labels, no_noise)
    moved = [x[0] + 100, x[1] + 5 + 25 + 1000, x[2] + 7.5 + 2000]
    expected = [x[0] + moved[0], x[1] + moved[1] / 4, x[2] + moved[2] / 128]
    np.testing.assert_allclose(end, expected, rtol=1e-6)


# ---- guidance ------------------------------------------------------------------------------------


class Spy:
    """A velocity of the label alone, 1 + label and 100 for the null label, counting its rows."""

    def __init__(self):
        self.labels = []

    def __call__(self, x, t, d, labels):
        self.labels.append(np.asarray(labels).tolist())
        value = jnp.where(labels == NULL, 100.0, 1.0 + labels)
        return jnp.zeros_like(x) + toys.per_row(value + 0 * t + 0 * d)


def ask(velocity):
    x, labels = start()
    return np.asarray(velocity(x, jnp.zeros(3), jnp.ones(3), labels))[:, 0, 0, 0].tolist()


def test_guidance_formula():
    spy = Spy()
    # v_uncond + w (v_cond - v_uncond) = 100 + 3 ({1, 2, 3} - 100)
    assert ask(guide(spy, 3.0, NULL)) == [-197, -194, -191]
    assert len(spy.labels) == 1 and sorted(spy.labels[0]) == [0, 1, 2, NULL, NULL, NULL]


def test_both_passes_of_guidance_see_the_same_x_t_and_d():
    def velocity(x, t, d, labels):
        return x + toys.per_row(10 * t + 100 * d)

    x, labels = start()
    t, d = jnp.asarray([0.0, 0.5, 0.75]), jnp.asarray([1.0, 0.25, 0.0])
    guided = guide(velocity, 3.0, NULL)(x, t, d, labels)
    np.testing.assert_allclose(guided, velocity(x, t, d, labels), rtol=1e-5)


def test_scale_1_is_conditional_and_scale_0_unconditional_each_in_one_pass():
    spy = Spy()
    assert ask(guide(spy, 1.0, NULL)) == [1, 2, 3]
    assert ask(guide(spy, 0.0, NULL)) == [100, 100, 100]
    assert spy.labels == [[0, 1, 2], [NULL, NULL, NULL]]


@pytest.mark.parametrize(
    ("scale", "guided", "expected"),
    [
        (3.0, True, [-197, -194, -191]),
        (3.0, False, [1, 2, 3]),
        (1.0, True, [1, 2, 3]),
        (0.0, True, [100, 100, 100]),
        (0.0, False, [100, 100, 100]),
    ],
)
def test_the_sampler_guides_only_where_it_is_told_to(scale, guided, expected):
    objective = Shortcut(null_label=NULL, cfg_scale=scale)
    assert ask(sampling_velocity(objective, Spy(), guided)) == expected


# ---- the compiled sampler ------------------------------------------------------------------------


def make_sampler(objective, velocity):
    mesh = sharding.make_mesh(1, 1)
    return sampling.make_sampler(
        objective,
        lambda params, *args: params * velocity(*args),
        sharding.replicated(mesh),
        mesh,
        seed=0,
        image_shape=SHAPE,
        num_classes=NULL,
    )


def test_few_step_samples_are_conditional_and_those_of_the_smallest_step_guided():
    def velocity(x, t, d, labels):
        return jnp.zeros_like(x) + toys.per_row(jnp.where(labels == NULL, 100.0, 1.0 + labels))

    objective = Shortcut(null_label=NULL, cfg_scale=3.0, denoise_timesteps=8)
    sample = make_sampler(objective, velocity)
    indices = np.arange(4)
    noise, expected_labels = sampling.initial(0, indices, SHAPE, NULL)
    for num_steps in (1, 4, 8):
        # params = 2 doubles every velocity
        images, labels = sample(jnp.asarray(2.0), indices, num_steps)
        np.testing.assert_array_equal(labels, expected_labels)
        conditional = 2 * (1.0 + labels)
        shift = 200 + 3 * (conditional - 200) if num_steps == 8 else conditional
        np.testing.assert_allclose(images, noise + toys.per_row(shift), rtol=1e-5)


# ---- noise and labels ----------------------------------------------------------------------------


@functools.cache
def two_thousand(seed=0):
    return sampling.initial(seed, np.arange(2000), SHAPE, 4)


@pytest.mark.parametrize("indices", [np.arange(4), np.array([1999, 7, 500, 8])])
def test_sample_i_does_not_depend_on_its_batch(indices):
    for whole, part in zip(two_thousand(), sampling.initial(0, indices, SHAPE, 4), strict=True):
        np.testing.assert_array_equal(whole[indices], part)


def test_noise_is_standard_normal_and_labels_are_uniform():
    noise, labels = two_thousand()
    assert noise.shape == (2000, *SHAPE) and noise.dtype == jnp.float32
    assert labels.shape == (2000,) and labels.dtype == jnp.int32
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.04
    assert len(np.unique(noise)) > 0.99 * noise.size
    counts = np.bincount(labels)
    assert len(counts) == 4 and ((counts - 500) ** 2 / 500).sum() < 16.3  # p = 0.001


def test_another_seed_gives_other_samples():
    (noise, labels), (other_noise, other_labels) = two_thousand(), two_thousand(seed=1)
    assert np.mean(np.asarray(noise) != np.asarray(other_noise)) > 0.99
    assert 0.7 < np.mean(np.asarray(labels) != np.asarray(other_labels)) < 0.8  # 3/4


# ---- pixels --------------------------------------------------------------------------------------


def test_to_uint8_inverts_the_scaling_of_the_data():
    values = np.arange(256, dtype=np.uint8)
    scaled = values.astype(np.float32) / 127.5 - 1
    pixels = sampling.to_uint8(scaled)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, values)


def test_to_uint8_clips_and_rounds_to_the_nearest():
    np.testing.assert_array_equal(
        sampling.to_uint8(np.float32([-9, -1.01, 1.01, 9])), [0, 0, 255, 255]
    )
    between = np.float32([100.4, 100.6]) / 127.5 - 1
    np.testing.assert_array_equal(sampling.to_uint8(between), [100, 101])
