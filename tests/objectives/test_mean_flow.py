"""MeanFlow: the identity u = v + d (v du/dx + du/dt - du/dd) against numpy in float64.

A network that answers 0 leaves the velocity v = x1 - x0 of every row as its target, which shows the
noise and the times of a draw; the same draw with another network must then give the identity's
target. Labels number the images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.mean_flow import MeanFlow
from tests import toys

N = 256
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)
COEFFICIENTS = (0.7, -0.4, 1.1, 0.3, -0.9, 0.0002)
JUMPS = np.arange(N) % 4 == 0  # rows with d > 0 at the default share


def unused(*args):
    raise AssertionError("this network was asked")


def zero(x, t, d, labels):
    return jnp.zeros_like(x)


def make_objective(**changes):
    return MeanFlow(null_label=NULL, **{"class_dropout": 0.0, **changes})


def make_batch(n=N):
    return toys.make_batch(n, SHAPE)


def make_targets(objective, velocity, *, batch=None, seed=0, index=0, num_shards=1):
    draw = rng.draws(seed, "train", index)
    velocities = Velocities(velocity, unused, unused)
    targets, scalars = objective.targets(
        draw, batch or make_batch(), velocities, PROGRESS, num_shards
    )
    return jax.tree.map(np.asarray, targets), scalars


@functools.cache
def sixteen_steps(**changes):
    """The rows of 16 steps of a network that answers 0: 1,024 jumps and 3,072 others."""
    objective = make_objective(**changes)
    steps = [make_targets(objective, zero, index=index)[0] for index in range(16)]
    return jax.tree.map(lambda *a: np.concatenate(a), *steps)


# ---- the identity --------------------------------------------------------------------------------


def nonlinear_velocity(a, b, c, e, f, g):
    """Every partial derivative depends on where it is taken."""

    def velocity(x, t, d, labels):
        t, d, labels = toys.per_row(t), toys.per_row(d), toys.per_row(labels)
        return a * x + b * x * t + c * x * d + e * t**2 + f * d**2 + g * labels

    return velocity


def reference_targets(objective, coefficients, targets, v):
    """The target of every row in float64, with the derivatives by hand."""
    a, b, c, e, f, g = coefficients
    x, v = targets.x_t.astype(np.float64), v.astype(np.float64)
    t, d = (toys.per_row(s.astype(np.float64)) for s in (targets.t, targets.d))
    if objective.cfg_scale not in (0, 1):
        unconditional = a * x + b * x * t + e * t**2 + g * NULL
        guided = unconditional + objective.cfg_scale * (v - unconditional)
        v = np.where(toys.per_row(targets.labels == NULL), v, guided)
    du_dx, du_dt, du_dd = a + b * t + c * d, b * x + 2 * e * t, c * x + 2 * f * d
    return v + d * (v * du_dx + du_dt - du_dd)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg_scale": 3.0, "class_dropout": 0.3},
        {"cfg_scale": 0.0},
        {"mean_flow_fraction": 0.375},
    ],
    ids=["default", "guided", "null", "3_of_8"],
)
def test_targets_match_numpy(changes):
    objective = make_objective(**changes)
    v = make_targets(make_objective(**{**changes, "cfg_scale": 1.0}), zero)[0].target
    targets, scalars = make_targets(objective, nonlinear_velocity(*COEFFICIENTS))
    expected = reference_targets(objective, COEFFICIENTS, targets, v)
    np.testing.assert_allclose(targets.target, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(targets.target - v)[targets.d > 0].mean() > 0.1
    rms = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(scalars["target_rms"], rms, rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "by_hand"),
    [
        (lambda x, t, d: 5.0 + 0 * x, lambda v, d: v),  # nothing changes along the path
        (lambda x, t, d: x, lambda v, d: v + d * v),
        (lambda x, t, d: 0 * x + t, lambda v, d: v + d),
        (lambda x, t, d: 0 * x + d, lambda v, d: v - d),  # the end stays where it is
        (lambda x, t, d: 0 * x + t + d, lambda v, d: v),  # u of the end t + d alone
    ],
    ids=["constant", "x", "t", "d", "end"],
)
def test_identity_by_hand(network, by_hand):
    objective = make_objective()

    def velocity(x, t, d, labels):
        return network(x, toys.per_row(t), toys.per_row(d))

    v = make_targets(objective, zero)[0].target
    targets, _ = make_targets(objective, velocity)
    np.testing.assert_allclose(
        targets.target, by_hand(v, toys.per_row(targets.d)), rtol=1e-4, atol=1e-5
    )


A, B = -1.5, 2.0


def average_velocity(x, t, d, labels):
    """Of dx/dt = A x + B t over [t, t + d], in closed form."""
    t, z = toys.per_row(t), A * toys.per_row(d)
    phi = jnp.where(z == 0, 1.0, jnp.expm1(z) / jnp.where(z == 0, 1.0, z))
    return (A * x + B * t + B / A) * phi - B / A


def test_the_exact_average_velocity_of_an_ode_is_its_own_target():
    # Images for which x1 - x0 is A x_t + B t: then the path's velocity is the ODE's.
    objective = make_objective()
    first, _ = make_targets(objective, zero)
    x0 = np.asarray(make_batch().image, np.float64) - first.target
    t = toys.per_row(first.t.astype(np.float64))
    v = (A * x0 + B * t) / (1 - A * t)
    batch = make_batch().replace(image=jnp.asarray(x0 + v, jnp.float32))

    targets, _ = make_targets(objective, average_velocity, batch=batch)
    u = average_velocity(*(jnp.asarray(getattr(targets, a)) for a in ("x_t", "t", "d", "labels")))
    np.testing.assert_allclose(targets.target, u, rtol=1e-4, atol=1e-4)
    # ... and it is not the velocity: jumps of this ODE are far from straight.
    assert np.abs(targets.target - v)[JUMPS].max() > 0.3
    # In one jump it leads to where the ODE does: e^A (x + B/A^2) - B/A - B/A^2 from t = 0.
    x = jnp.ones((1, *SHAPE))
    d, start, label = jnp.ones(1), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    end = objective.step(average_velocity, x, start, d, label, unused)
    np.testing.assert_allclose(end, np.exp(A) * (1 + B / A**2) - B / A - B / A**2, rtol=1e-5)


def test_rows_without_a_jump_regress_the_velocity_of_the_path():
    targets, _ = make_targets(make_objective(), nonlinear_velocity(*COEFFICIENTS))
    v = make_targets(make_objective(), zero)[0].target
    np.testing.assert_array_equal(targets.target[~JUMPS], v[~JUMPS])
    x1, t = np.asarray(make_batch().image), toys.per_row(targets.t)
    expected = (1 - t) * (x1 - v) + t * x1  # all rows lie on the path
    np.testing.assert_allclose(targets.x_t, expected, rtol=1e-5, atol=1e-5)


def test_derivatives_are_of_the_network_with_the_rows_own_label():
    def velocity(x, t, d, labels):
        return x * toys.per_row(labels)

    v = make_targets(make_objective(), zero)[0].target
    targets, _ = make_targets(make_objective(), velocity)
    expected = v * toys.per_row(1 + targets.d * np.arange(N))
    np.testing.assert_allclose(targets.target, expected, rtol=1e-4)


def test_no_gradient_flows_through_the_targets():
    objective, batch = make_objective(cfg_scale=2.0, class_dropout=0.1), make_batch()

    def loss(params):
        velocity = nonlinear_velocity(*params)
        draw = rng.draws(0, "train", 0)
        velocities = Velocities(velocity, velocity)
        targets, _ = objective.targets(draw, batch, velocities, PROGRESS)
        return jnp.sum(targets.target**2) + jnp.sum(targets.x_t**2)

    gradient = jax.jit(jax.grad(loss))(COEFFICIENTS)
    np.testing.assert_array_equal(np.asarray(gradient), 0)


# ---- guidance and labels -------------------------------------------------------------------------


def test_guidance_by_hand():
    # u = 5 for the null label: v -> 5 + 3 (v - 5), but rows that dropped their label keep v.
    def velocity(x, t, d, labels):
        return jnp.zeros_like(x) + toys.per_row(jnp.where(labels == NULL, 5.0, 1.0))

    objective = make_objective(cfg_scale=3.0, class_dropout=0.5)
    v = make_targets(make_objective(class_dropout=0.5), zero)[0].target
    targets, _ = make_targets(objective, velocity)
    dropped = targets.labels == NULL
    assert 80 < dropped.sum() < 176
    np.testing.assert_allclose(targets.target[~dropped], 3 * v[~dropped] - 10, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(targets.target[dropped], v[dropped])


def test_the_guided_velocity_is_the_direction_of_the_derivative():
    # u = x: the target is (1 + d) v, whatever v is; here v_uncond = x_t too.
    objective = make_objective(cfg_scale=3.0)
    v = make_targets(make_objective(), zero)[0].target
    targets, _ = make_targets(objective, lambda x, t, d, labels: x)
    expected = (1 + toys.per_row(targets.d)) * (targets.x_t + 3 * (v - targets.x_t))
    np.testing.assert_allclose(targets.target, expected, rtol=1e-4, atol=1e-4)


def test_the_unconditional_velocity_is_asked_at_the_rows_point_and_time_at_d_0():
    calls = []

    def spy(x, t, d, labels):
        if not isinstance(x, jax.core.Tracer):  # the derivative's pass has no values to see
            calls.append([np.asarray(a) for a in (x, t, d, labels)])
        return jnp.zeros_like(x)

    targets, _ = make_targets(make_objective(cfg_scale=3.0), spy)
    ((x, t, d, labels),) = calls
    np.testing.assert_array_equal(x, targets.x_t)
    np.testing.assert_array_equal(t, targets.t)
    np.testing.assert_array_equal(d, 0)
    np.testing.assert_array_equal(labels, NULL)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_labels_of_all_rows_are_dropped_with_the_probability(probability):
    targets = sixteen_steps(class_dropout=probability)
    dropped = targets.labels == NULL
    for kind in (targets.d > 0, targets.d == 0):
        tolerance = 4 * (probability * (1 - probability) / kind.sum()) ** 0.5
        assert abs(dropped[kind].mean() - probability) <= tolerance
    np.testing.assert_array_equal(targets.labels[~dropped], np.tile(np.arange(N), 16)[~dropped])


def test_cfg_scale_0_trains_the_null_label_alone():
    assert (make_targets(make_objective(cfg_scale=0.0), zero)[0].labels == NULL).all()


# ---- rows, times and noise -----------------------------------------------------------------------


def test_fields_of_every_row():
    targets, _ = make_targets(make_objective(), zero)
    toys.assert_fields(targets, N, SHAPE)
    assert (targets.weight == 1).all()


def test_the_first_rows_of_each_group_jump():
    for share, start in ((0.25, [1, 0, 0, 0]), (0.375, [1, 1, 1, 0, 0, 0, 0, 0])):
        targets, _ = make_targets(make_objective(mean_flow_fraction=share), zero)
        expected = np.tile(start, N // len(start))
        np.testing.assert_array_equal(targets.branch, expected)
        np.testing.assert_array_equal(targets.d > 0, expected)
        assert (targets.d >= 0).all()
    assert MeanFlow(null_label=NULL).mean_flow_fraction == 0.25
    assert MeanFlow(null_label=NULL).branches == ("empirical", "mean_flow")


def logit(p):
    p = p.astype(np.float64)
    return np.log(p / (1 - p))


@pytest.mark.parametrize(("mean", "std"), [(0.4, 1.0), (-0.5, 0.5)])
def test_a_jump_is_between_two_sorted_sigmoids_of_normals(mean, std):
    targets = sixteen_steps(time_mean=mean, time_std=std)
    jump = targets.d > 0
    start, end = logit(targets.t[jump]), logit((targets.t + targets.d)[jump])
    # The smaller and larger of two draws of N(0, 1) have mean -+1/sqrt(pi), and their sum and
    # distance are independent, with variances 2 and 2 - 4/pi.
    low, high = (start - mean) / std, (end - mean) / std
    assert (high > low).all()
    assert abs(low.mean() + np.pi**-0.5) < 0.11 and abs(high.mean() - np.pi**-0.5) < 0.11
    assert abs((high + low).std() - 2**0.5) < 0.13
    assert abs((high - low).std() - (2 - 4 / np.pi) ** 0.5) < 0.1
    assert abs(np.corrcoef(high + low, high - low)[0, 1]) < 0.13
    # Together they are two independent draws.
    both = np.sort(np.concatenate([low, high]))
    assert abs(both.mean()) < 0.09 and abs(both.std() - 1) < 0.07
    assert abs(np.mean(np.abs(both) < 0.6745) - 0.5) < 0.05


def test_times_without_a_jump_are_sigmoids_of_the_smaller_of_two_normals():
    targets = sixteen_steps(time_mean=-0.5, time_std=0.5)
    normal = (logit(targets.t[targets.d == 0]) + 0.5) / 0.5
    cdf = np.sort(1 - (1 - scipy.stats.norm.cdf(normal)) ** 2)
    distance = np.abs(cdf - (np.arange(cdf.size) + 0.5) / cdf.size).max()  # Kolmogorov-Smirnov
    assert distance < 1.95 / np.sqrt(cdf.size)  # p = 0.001


def test_default_times_are_meanflows_turned_to_our_direction():
    # N(-0.4, 1) for a time that runs from data to noise.
    objective = MeanFlow(null_label=NULL)
    assert (objective.time_mean, objective.time_std) == (0.4, 1.0)


def test_noise_is_standard_normal_and_independent_of_times_images_and_dropped_labels():
    targets = sixteen_steps(class_dropout=0.3)
    image = np.tile(np.asarray(make_batch().image), (16, 1, 1, 1))
    noise = image - targets.target
    assert abs(noise.mean()) < 0.045 and abs(noise.std() - 1) < 0.032
    assert len(np.unique(noise)) > 0.99 * noise.size
    columns = [noise[:, 0, 0, 0], noise[:, 0, 0, 1], targets.t, targets.labels == NULL]
    correlations = np.corrcoef([*columns, image[:, 0, 0, 0]])
    assert np.abs(correlations - np.eye(5)).max() < 0.065


def test_targets_are_a_function_of_seed_and_step():
    objective = make_objective(class_dropout=0.5)
    one, _ = make_targets(objective, zero)
    for num_shards in (1, 8):
        again, _ = make_targets(objective, zero, num_shards=num_shards)
        jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets, _ = make_targets(objective, zero, **other)
        for name in ("x_t", "t", "d", "labels"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


# ---- weight, cost, validation and sampling -------------------------------------------------------


def test_adaptive_weight_by_hand():
    error = jnp.asarray([0.0, 0.99, 3.99])  # summed over pixels
    for power, expected in ((1.0, [100, 1, 0.25]), (0.5, [10, 1, 0.5]), (0.0, [1, 1, 1])):
        weight = make_objective(weight_power=power).adaptive_weight(error / 64, pixels=64)
        np.testing.assert_allclose(weight / 64, expected, rtol=1e-5)
        # What is minimised is the weighted sum, whatever the number of pixels.
        on_latents = make_objective(weight_power=power).adaptive_weight(error / 4096, pixels=4096)
        np.testing.assert_allclose(on_latents * error / 4096, weight * error / 64, rtol=1e-5)
    assert MeanFlow(null_label=NULL).weight_power == 1


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, 2 * 64),
        ({"cfg_scale": 0.0}, 2 * 64),
        ({"cfg_scale": 3.0}, 2 * 64 + 256),
        ({"mean_flow_fraction": 0.375}, 2 * 96),
    ],
)
def test_target_evaluations_are_the_rows_passed_to_the_network(changes, by_hand):
    evaluations = []

    def spy(x, t, d, labels):
        # A Jacobian-vector product passes values and their derivatives.
        evaluations.append(len(t) * (2 if isinstance(x, jax.core.Tracer) else 1))
        return jnp.zeros_like(x)

    objective = make_objective(**changes)
    make_targets(objective, spy)
    assert sum(evaluations) == objective.target_evaluations(N) == by_hand


def test_bad_settings_are_refused():
    make_objective().validate(256, 8)
    with pytest.raises(UserError, match=r"batch_size=36 .*32.* 64\."):
        make_objective().validate(36, 8)
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=f"objective.mean_flow_fraction={share}"):
            make_objective(mean_flow_fraction=share).validate(256, 1)


def test_sampling_jumps_by_the_average_velocity_without_guidance():
    objective = make_objective(cfg_scale=3.0)
    for steps in (1, 2, 3, 128):
        objective.check_steps(steps)
        assert not objective.guided(steps)  # the targets are
    sizes = jnp.asarray([1.0, 0.5, 0.01])
    np.testing.assert_array_equal(objective.query_size(sizes), sizes)
    assert MeanFlow.uses_step_size

    def velocity(x, t, d, labels):
        return x + toys.per_row(10 * t + 100 * d + 1000 * labels)

    t, d, labels = jnp.asarray([0.0, 0.5]), jnp.full(2, 0.5), jnp.asarray([0, 2])
    end = objective.step(velocity, jnp.ones((2, *SHAPE)), t, d, labels, unused)
    np.testing.assert_allclose(end[:, 0, 0, 0], [1 + 51 / 2, 1 + 2056 / 2])
