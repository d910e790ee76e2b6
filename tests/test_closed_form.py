"""Targets and samplers against the exact flow of a mixture of Gaussians.

Tolerances. The truth is float64 Runge-Kutta of 128 substeps, within 1e-7. The same shortcut as a
network (`shortcut`: float32, 40 substeps) is within 1e-5 of it by its method, and rounding adds
less: what a few of its answers make up must be within EXACT. Random checks are in standard errors
and allow 4.5, which one of 150,000 right ones exceeds; their draws are fixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng, sampling
from shortcut_jax.objectives import Batch, Progress, Velocities, common
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

NULL = 1
M = 128
EXACT = 2e-5
STANDARD_ERRORS = 4.5
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
FLOW = FlowMatching(null_label=NULL)
SHORTCUT = Shortcut(null_label=NULL)
# But for the share of rows, with whose shapes no other test would share compiled operations.
AUTHORS = {**Shortcut.authors_code, "bootstrap_fraction": 0.25}


@jax.jit
def shortcut(x, t, d, labels=None):
    """The exact shortcut; d = 0 asks for the exact velocity."""
    return truth.average_velocity(x, t, d, 40, loop=jax.lax.fori_loop)


@jax.jit
def jax_velocity(x, t, d=None, labels=None):
    return truth.velocity(x, t)


def shortcut_over_1_128(x, t, d, labels):
    """The exact shortcut of a network that takes d = 0 for the smallest step."""
    return shortcut(x, t, jnp.where(d == 0, 1 / M, d))


def to_the_end(x, t, d, labels):
    """The exact consistency function, x + (1 - t) v = X_{t->1}(x)."""
    return shortcut(x, t, 1 - t)


def exact_noise(x, t, d, labels):
    """E[x_0 | x] at diffusion's level s = 1000 (1 - t) - 1."""
    alpha_bar = jnp.asarray(ALPHA_BAR, jnp.float32)[jnp.round(1000 * (1 - t)).astype(int) - 1]
    return truth.posterior_means(x, jnp.sqrt(1 - alpha_bar), jnp.sqrt(alpha_bar))[0]


def unused(*args):
    raise AssertionError("no network is asked here")


def zero(x, t, d, labels):
    return jnp.zeros_like(x)


def make_targets(objective, n, *, online=unused, ema=unused, teacher=unused, stage=0, stages=1):
    batch = Batch(jnp.asarray(truth.sample(n), jnp.float32), jnp.zeros(n, jnp.int32))
    draw, velocities = rng.draws(0, "train", 0), Velocities(online, ema, teacher)
    targets, _ = objective.targets(draw, batch, velocities, Progress(jnp.int32(stage), stages))
    return batch, jax.tree.map(np.asarray, targets)


def rms(error):
    return np.sqrt(np.mean(error**2))


def order(step_counts, errors):
    """p of error = C / n^p, between neighbours."""
    return -np.diff(np.log(errors)) / np.diff(np.log(step_counts))


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


def variance_preserving(t):
    alpha_bar = ALPHA_BAR[np.rint(1000 * (1 - t)).astype(int) - 1]
    return np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar), 1.0, 0.0


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


# ---- 3. samplers ---------------------------------------------------------------------------------


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


def euler(x, num_steps):
    """Euler's method in float64."""
    for i in range(num_steps):
        x = x + truth.velocity(x, np.full(len(x), i / num_steps)) / num_steps
    return x


def test_the_smallest_shortcuts_are_eulers_steps():
    def velocity_at_0(x, t, d, labels):
        return jnp.where(rows(d) == 0, truth.velocity(x, t), jnp.nan)

    x = truth.noise(256)
    end = integrate(SHORTCUT, velocity_at_0, x, M)
    np.testing.assert_allclose(end, euler(x, M), atol=EXACT)
    # What the exact network loses by answering d = 0 with the velocity: Euler's error, 1.3 / M.
    assert 1 / M < rms(end - truth.exact_end(x)) < 2 / M


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
