"""Samplers against the exact flow of a mixture of Gaussians: see exact_networks.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import sampling
from shortcut_jax.objectives.base import rows
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from shortcut_jax.objectives.diffusion import Diffusion
from shortcut_jax.objectives.mean_flow import MeanFlow
from tests import gaussian_mixture as truth
from tests.exact_networks import (
    ALPHA_BAR,
    EXACT,
    FLOW,
    NULL,
    SHORTCUT,
    STANDARD_ERRORS,
    M,
    euler,
    exact_noise,
    jax_velocity,
    order,
    rms,
    shortcut,
    shortcut_over_1_128,
    to_the_end,
    variance_preserving,
)


@functools.cache
def integrator(objective, velocity):
    """integrate as the sampler calls it: compiled once for all numbers of steps."""

    def run(x, num_steps):
        def noise(i):
            return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape)

        labels = jnp.zeros(len(x), jnp.int32)
        return sampling.integrate(objective, velocity, x, labels, num_steps, noise)

    return jax.jit(run)


def integrate(objective, velocity, x, num_steps):
    end = integrator(objective, velocity)(jnp.asarray(x, jnp.float32), num_steps)
    return np.asarray(end, np.float64)


DDIM = Diffusion(null_label=NULL, sampler="ddim")


@pytest.mark.parametrize(
    ("objective", "velocity", "solution"),
    [
        (FLOW, jax_velocity, truth.exact_end),
        (DDIM, exact_noise, lambda x: truth.exact_end_of_diffusion(x, ALPHA_BAR[-1])),
    ],
    ids=["euler", "ddim"],
)
def test_deterministic_samplers_converge_to_the_solution_of_their_ode_with_order_1(
    objective, velocity, solution
):
    x, step_counts = truth.noise(256), (16, 32, 64, 128)
    exact = solution(x)
    errors = [rms(integrate(objective, velocity, x, n) - exact) for n in step_counts]
    slopes = order(step_counts, errors)
    assert (slopes > 0.9).all() and (slopes < 1.1).all(), (errors, slopes)


def test_ddpm_converges_to_the_data():
    x, ddpm = truth.noise(4000), Diffusion(null_label=NULL)

    def worst(num_steps):
        return np.abs(truth.z_scores(integrate(ddpm, exact_noise, x, num_steps))).max()

    # Order 1 in n, until the 4,000 samples hide the rest.
    assert worst(4) > 3 * worst(16) > 9 * worst(64)
    assert worst(512) < STANDARD_ERRORS


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_one_step_of_diffusion_is_the_mean_of_the_data_given_the_noise(sampler):
    x = truth.noise(256)
    end = integrate(Diffusion(null_label=NULL, sampler=sampler), exact_noise, x, 1)
    a, b, _, _ = variance_preserving(np.zeros(256))
    # The data are 0.6 % of x: dividing by that makes rounding errors of 1e-4.
    np.testing.assert_allclose(end, truth.posterior_means(x, a, b)[1], atol=5e-4)


def test_consistency_samplers_of_the_exact_consistency_function():
    # One step is the exact map, whatever is done at its end.
    x, renoise = truth.noise(4000), ConsistencyTraining(null_label=NULL)
    euler = ConsistencyTraining(null_label=NULL, sampler="euler")
    one_step, exact = integrate(renoise, to_the_end, x, 1), truth.exact_end(x[:256])
    np.testing.assert_allclose(one_step[:256], exact, atol=EXACT)
    np.testing.assert_allclose(integrate(euler, to_the_end, x[:256], 1), exact, atol=EXACT)
    # New noise after each step leads to other samples, of the same distribution.
    four_steps = integrate(renoise, to_the_end, x, 4)
    assert np.abs(truth.z_scores(four_steps)).max() < STANDARD_ERRORS
    assert rms(four_steps - one_step) > 0.5


@pytest.mark.parametrize(
    ("objective", "velocity", "step_counts"),
    [
        (SHORTCUT, shortcut_over_1_128, [2**level for level in range(8)]),
        (MeanFlow(null_label=NULL), shortcut, [1, 3, 16]),
    ],
    ids=["shortcut", "mean_flow"],
)
def test_exact_shortcuts_lead_to_the_exact_end_in_any_number_of_steps(
    objective, velocity, step_counts
):
    x = truth.noise(256)
    exact = truth.exact_end(x)
    for n in step_counts:
        np.testing.assert_allclose(integrate(objective, velocity, x, n), exact, atol=EXACT)


def test_the_smallest_shortcuts_are_eulers_steps():
    def velocity_at_0(x, t, d, labels):
        return jnp.where(rows(d) == 0, truth.velocity(x, t), jnp.nan)

    x = truth.noise(256)
    end = integrate(SHORTCUT, velocity_at_0, x, M)
    np.testing.assert_allclose(end, euler(x, M), atol=EXACT)
    # What the exact network loses by answering d = 0 with the velocity: Euler's error, 1.3 / M.
    assert 1 / M < rms(end - truth.exact_end(x)) < 2 / M
