"""Targets against the exact flow of a mixture of Gaussians: see exact_networks.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.objectives import common
from shortcut_jax.objectives.base import rows
from shortcut_jax.objectives.consistency_distillation import ConsistencyDistillation
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from shortcut_jax.objectives.diffusion import Diffusion
from shortcut_jax.objectives.flow_matching import FlowMatching
from shortcut_jax.objectives.live_reflow import LiveReflow
from shortcut_jax.objectives.mean_flow import MeanFlow
from shortcut_jax.objectives.progressive_distillation import ProgressiveDistillation
from shortcut_jax.objectives.shortcut import Shortcut
from tests import gaussian_mixture as truth
from tests.exact_networks import (
    ALPHA_BAR,
    AUTHORS,
    EXACT,
    FLOW,
    NULL,
    SHORTCUT,
    STANDARD_ERRORS,
    M,
    euler,
    jax_velocity,
    make_targets,
    order,
    rms,
    shortcut,
    shortcut_over_1_128,
    to_the_end,
    variance_preserving,
    zero,
)

# ---- the truth itself ----------------------------------------------------------------------------


def test_the_exact_flows_carry_noise_to_the_data():
    # 256 substeps change nothing: order 4 leaves 1e-7 at 128.
    x = truth.noise(500)
    np.testing.assert_allclose(truth.exact_end(x), truth.exact_end(x, substeps=256), atol=2e-7)
    assert np.abs(truth.z_scores(truth.sample(5000))).max() < STANDARD_ERRORS
    x = truth.noise(5000)
    assert np.abs(truth.z_scores(x)).max() > 10 * STANDARD_ERRORS
    assert np.abs(truth.z_scores(truth.exact_end(x, substeps=32))).max() < STANDARD_ERRORS
    # At the last noise level 0.6 % of the data's amplitude are left: x is noise, almost.
    end = truth.exact_end_of_diffusion(x, ALPHA_BAR[-1], substeps=32)
    assert np.abs(truth.z_scores(end)).max() < STANDARD_ERRORS


def test_the_network_is_the_truth_in_float32():
    _, targets = make_targets(Shortcut(null_label=NULL, bootstrap_fraction=0.5), 512, ema=zero)
    x, t, d = targets.x_t, targets.t, targets.d
    np.testing.assert_allclose(shortcut(x, t, d), truth.exact_shortcut(x, t, d), atol=EXACT)


# ---- 1. what the regressions of instantaneous quantities lead to ---------------------------------


def straight(noise_floor=0.0):
    """a, b of x_t = a x_0 + b x_1 and of the target, as functions of t."""
    keep = 1 - noise_floor
    return lambda t: (1 - keep * t, t, -keep, 1.0)


def exact_mean(path, x, t):
    """E[target | x_t = x]: what least squares leads to."""
    a, b, of_x0, of_x1 = path(t)
    x0, x1 = truth.posterior_means(x, a, b)
    return of_x0 * x0 + of_x1 * x1


def worst_residual(target, mean, x, t):
    """By how many standard errors target - mean correlates with functions of x and t, at most."""
    x, mean, residual = (a.reshape(-1, 2) for a in (x, mean, target - mean))
    t = t[:, None]
    functions = np.concatenate([t**0, t, x, t * x, np.sin(2 * x), mean], axis=1)
    products = residual[:, :, None] * functions[:, None]
    z = products.mean(0) / products.std(0) * np.sqrt(len(x))
    return np.abs(z).max()


def fit(target, mean, x, t):
    """Least squares of the target in mean, x, t x and 1: coefficients and standard errors."""
    one = np.ones_like(x[:1])
    basis = np.stack([a.ravel() for a in (mean, x, rows(t) * x, one + 0 * x)], axis=1)
    coefficients, (squared_error,), _, _ = np.linalg.lstsq(basis, target.ravel())
    covariance = np.linalg.inv(basis.T @ basis) * squared_error / len(basis)
    return coefficients, np.sqrt(covariance.diagonal())


def empirical(objective, n=65_536):
    """x_t, t and target of the rows with d = 0, in float64."""
    _, targets = make_targets(objective, n, online=zero, ema=zero)
    kept = targets.d == 0
    assert kept.sum() >= 0.74 * n
    return [a[kept].astype(np.float64) for a in (targets.x_t, targets.t, targets.target)]


@pytest.mark.parametrize(
    ("objective", "path"),
    [
        (FLOW, straight()),
        (FlowMatching(null_label=NULL, noise_floor=0.25, flow_time_grid=8), straight(0.25)),
        (SHORTCUT, straight()),
        (Shortcut(null_label=NULL, **AUTHORS), straight(1e-5)),
        (LiveReflow(null_label=NULL, reflow_steps=1), straight()),
        (Diffusion(null_label=NULL), variance_preserving),
    ],
    ids=["flow", "flow_floor_grid", "shortcut", "authors", "live_reflow", "diffusion"],
)
def test_empirical_targets_have_the_exact_conditional_mean(objective, path):
    x, t, target = empirical(objective)
    mean = exact_mean(path, x, t)
    assert worst_residual(target, mean, x, t) < STANDARD_ERRORS
    coefficients, standard_errors = fit(target, mean, x, t)
    assert standard_errors[0] < 0.02
    z = (coefficients - [1, 0, 0, 0]) / standard_errors
    assert np.abs(z).max() < STANDARD_ERRORS, coefficients


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t: -truth.velocity(x, t),
        lambda x, t: truth.velocity(x, 1 - t),
        lambda x, t: truth.velocity(x, t - 1 / 32),
        lambda x, t: exact_mean(straight(0.1), x, t),
    ],
    ids=["sign", "direction", "time", "noise_floor"],
)
def test_a_wrong_conditional_mean_is_seen(wrong):
    x, t, target = empirical(FLOW)
    assert worst_residual(target, wrong(x, t), x, t) > 2 * STANDARD_ERRORS


# ---- 2. the self-consistency of the exact flow map -----------------------------------------------


@pytest.mark.parametrize("sections", [2**level for level in range(7)])
def test_two_exact_steps_average_to_the_exact_step_of_twice_the_size(sections):
    x = truth.noise(max(64, 4 * sections))
    t = np.arange(len(x)) % sections / sections
    d = np.full(len(x), 0.5 / sections)
    first = truth.exact_shortcut(x, t, d)
    x_middle = x + rows(d) * first
    whole = truth.exact_shortcut(x, t, 2 * d)
    identity = (first + truth.exact_shortcut(x_middle, t + d, d)) / 2
    # Not the same by construction: the two halves take twice the substeps of the whole.
    np.testing.assert_allclose(identity, whole, atol=1e-7)
    # The paper's display prints time t in the second half: off by d/2 ds/dt, and ds/dt is 2 to 3.
    typo = (first + truth.exact_shortcut(x_middle, t, d)) / 2
    assert rms(typo - whole) > d[0]


# ---- 4. targets that are asked of exact networks -------------------------------------------------


def bootstrapped(objective, **networks):
    """x_t, t, d, target of the rows with d > 0, in float64."""
    _, targets = make_targets(objective, 512, **networks)
    kept = targets.d > 0
    return [a[kept].astype(float) for a in (targets.x_t, targets.t, targets.d, targets.target)]


@pytest.mark.parametrize("settings", [{}, {"step_size_sampling": "stratified"}], ids=str)
def test_shortcut_targets_of_the_exact_shortcut_are_the_exact_shortcut(settings):
    objective = Shortcut(null_label=NULL, bootstrap_fraction=0.5, **settings)
    x, t, d, target = bootstrapped(objective, ema=shortcut_over_1_128)
    assert set(d) == {2.0**-level for level in range(7)}
    np.testing.assert_allclose(target, truth.exact_shortcut(x, t, d), atol=EXACT)
    one_step = d == 1
    end = x[one_step] + target[one_step]
    np.testing.assert_allclose(end, truth.exact_end(x[one_step]), atol=EXACT)


def test_only_the_smallest_targets_have_the_error_of_two_euler_steps():
    # d = 0 is answered by the velocity, which is off the average over 1/128 by 1/256 dv/dt.
    objective = Shortcut(null_label=NULL, bootstrap_fraction=0.5)
    x, t, d, target = bootstrapped(objective, ema=shortcut)
    exact = truth.exact_shortcut(x, t, d)
    small = d == 2 / M
    np.testing.assert_allclose(target[~small], exact[~small], atol=EXACT)
    x, t = x[small], t[small]
    v = truth.velocity(x, t)
    two_euler_steps = (v + truth.velocity(x + v / M, t + 1 / M)) / 2
    np.testing.assert_allclose(target[small], two_euler_steps, atol=EXACT)
    assert 0.5 / M < rms(target[small] - exact[small]) < 2 / M


def test_one_step_bootstrapped_from_the_velocity_alone_is_as_many_steps_of_euler():
    def average(level):
        if level == 5:
            return jax_velocity

        def step(x, t):
            d = jnp.full_like(t, 0.5 ** (level + 1))
            half = average(level + 1)
            return common.two_step_target(half, x, t, d, clip_middle=0.0, clip_target=0.0)[0]

        return step

    x = truth.noise(256)
    end = x + np.asarray(average(0)(jnp.asarray(x, jnp.float32), jnp.zeros(256)))
    np.testing.assert_allclose(end, euler(x, 2**5), atol=EXACT)


@pytest.mark.parametrize("stage", range(7))
def test_progressive_distillation_of_an_exact_teacher_is_exact_in_every_stage(stage):
    objective = ProgressiveDistillation(null_label=NULL)
    x, t, d, target = bootstrapped(objective, teacher=shortcut, stage=stage, stages=7)
    assert set(d) == {2.0 ** (stage + 1) / M}
    np.testing.assert_allclose(target, truth.exact_shortcut(x, t, d), atol=EXACT)


def predicted_end_error(m, teacher):
    """Of the end that consistency distillation's targets point to."""
    objective = ConsistencyDistillation(null_label=NULL, denoise_timesteps=m)
    _, targets = make_targets(objective, 512, ema=to_the_end, teacher=teacher)
    x, t = targets.x_t.astype(float), targets.t.astype(float)
    return x + rows(1 - t) * targets.target - truth.exact_end(x, t)


def test_consistency_distillation_is_off_by_one_euler_step_of_the_teacher():
    sizes = (16, 32, 128)
    errors = [rms(predicted_end_error(m, shortcut)) for m in sizes]
    # One step: order 2. A student that trusts M such targets in a row is off with order 1.
    slopes = order(sizes, errors)
    assert (slopes > 1.8).all() and (slopes < 2.2).all(), (errors, slopes)
    # Of a teacher that makes its step without error, nothing is left.
    error = predicted_end_error(M, lambda x, t, d, labels: shortcut(x, t, 1 / M + 0 * t))
    np.testing.assert_allclose(error, 0, atol=EXACT)


def test_consistency_training_is_right_on_average_over_the_paths_through_a_point():
    # Up to O(1/sections^2) in the predicted end. These rows tell it from 0 for 2 sections, where
    # too many pairs that part later meet in a point, and not for 64.
    def residual(stage):
        objective = ConsistencyTraining(null_label=NULL)
        _, targets = make_targets(objective, 512, ema=to_the_end, stage=stage, stages=7)
        x, t, target = (a.astype(float) for a in (targets.x_t, targets.t, targets.target))
        return worst_residual(target, truth.exact_shortcut(x, t, 1 - t), x, t)

    assert residual(stage=6) < STANDARD_ERRORS < residual(stage=1)


def test_mean_flow_targets_are_exact_up_to_the_velocity_of_the_path():
    # The target asks for dx/dt of the flow, v(x, t), and has x_1 - x_0, whose mean that is. As it
    # is linear in it, u + d du/dt = s + dX_{t->t+d}/dx (x_1 - x_0 - v), whose mean is s.
    objective = MeanFlow(null_label=NULL, mean_flow_fraction=0.5)
    batch, targets = make_targets(objective, 512, online=shortcut)
    x1 = np.asarray(batch.image, float)
    x, t, d, target = (a.astype(float) for a in (targets.x_t, targets.t, targets.d, targets.target))
    assert (d > 0).sum() == 256
    difference = (x1 - x) / rows(1 - t) - truth.velocity(x, t)

    def end(x):
        return x + rows(d) * truth.exact_shortcut(x, t, d)

    step = 1e-4
    transported = (end(x + step * difference) - end(x - step * difference)) / (2 * step)
    exact = truth.exact_shortcut(x, t, d) + transported
    np.testing.assert_allclose(target, exact, rtol=1e-3, atol=1e-3)


def test_live_reflow_leads_to_where_the_flow_does_with_order_1():
    step_counts, errors = (16, 64), []
    for n in step_counts:
        objective = LiveReflow(null_label=NULL, bootstrap_fraction=0.5, reflow_steps=n)
        x, t, d, target = bootstrapped(objective, online=jax_velocity)
        assert set(d) == {1}
        x0 = x - rows(t) * target
        errors.append(rms(x0 + target - truth.exact_end(x0)))
    slopes = order(step_counts, errors)
    assert (slopes > 0.9).all() and (slopes < 1.1).all(), (errors, slopes)
