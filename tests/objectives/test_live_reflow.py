"""Live reflow: flow rows and reflow rows of one batch, against numpy in float64.

The velocity of most tests is a x + b t + c d + e label: asking the network at a wrong point, time,
size or label changes the answer. Labels number the images. Reflow rows are told apart by where they
are in their group, and their noise is found from where they lie on their straight path.
"""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.live_reflow import LiveReflow
from tests import toys

N = 256
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)
COEFFICIENTS = (-0.5, 0.3, 1.1, 0.002)


def unused(*args):
    raise AssertionError("this network was asked")


def make_objective(**changes):
    return LiveReflow(null_label=NULL, **{"class_dropout": 0.0, "reflow_steps": 4, **changes})


VELOCITY = toys.linear_velocity(*COEFFICIENTS)


def make_batch(n=N, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(objective, velocity=None, *, batch=None, seed=0, index=0, num_shards=1):
    draw = rng.draws(seed, "train", index)
    velocities = Velocities(velocity or VELOCITY, unused, unused)
    targets, scalars = objective.targets(
        draw, batch or make_batch(), velocities, PROGRESS, num_shards
    )
    return jax.tree.map(np.asarray, targets), scalars


def reflow_rows(objective, n=N):
    """Mask of the reflow rows: the first p of every q."""
    share = fractions.Fraction(objective.bootstrap_fraction).limit_denominator(64)
    return np.arange(n) % share.denominator < share.numerator


def noise_of(objective, targets):
    """x0 of reflow rows: x_t = (1 - (1-f) t) x0 + t x_end, with x_end = x0 + target."""
    t = toys.per_row(targets.t.astype(np.float64))
    return (targets.x_t - t * targets.target) / (1 + objective.noise_floor * t)


def spied(objective, **options):
    """Targets, and x, t, d, labels of every call of the network."""
    calls = []

    def spy(*args):
        jax.debug.callback(lambda *a: calls.append(a), *args, ordered=True)
        return VELOCITY(*args)

    targets, _ = make_targets(objective, spy, **options)
    jax.effects_barrier()
    return targets, [[np.asarray(a) for a in call] for call in calls]


# ---- reflow rows ---------------------------------------------------------------------------------


def denoised(objective, x0, labels):
    """Where the Euler steps lead, in float64."""
    a, b, _, e = COEFFICIENTS
    w, x, steps = objective.cfg_scale, x0, objective.reflow_steps
    for i in range(steps):
        conditional = a * x + b * i / steps + e * toys.per_row(labels)
        unconditional = a * x + b * i / steps + e * NULL
        x = x + (unconditional + w * (conditional - unconditional)) / steps
    return x


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reflow_steps": 1},
        {"cfg_scale": 3.0, "reflow_steps": 8},
        {"cfg_scale": 0.0},
        {"noise_floor": 0.25},
        {"bootstrap_fraction": 0.375},
        {**LiveReflow.authors_code, "cfg_scale": 1.5},
    ],
    ids=["default", "1_step", "guided", "null", "floor", "3_of_8", "authors"],
)
def test_reflow_rows_match_numpy(changes):
    objective = make_objective(**changes)
    targets, scalars = make_targets(objective)
    x0 = noise_of(objective, targets)
    expected = denoised(objective, x0, targets.labels) - x0
    rows = reflow_rows(objective)
    assert 0 < rows.sum() < N
    np.testing.assert_allclose(targets.target[rows], expected[rows], rtol=1e-4, atol=1e-4)
    assert abs(x0[rows].mean()) < 0.35 and abs(x0[rows].std() - 1) < 0.25  # 4 errors of 64
    rms = np.sqrt(np.mean(targets.target[rows] ** 2))
    np.testing.assert_allclose(scalars["reflow_target_rms"], rms, rtol=1e-5)


def test_denoising_by_hand():
    objective = make_objective(reflow_steps=2)
    rows = reflow_rows(objective)
    # v = -x, two steps of 1/2: x0 -> x0/2 -> x0/4, so the target is -3/4 x0 and
    # x_t = x0 - 3/4 t x0.
    targets, _ = make_targets(objective, lambda x, t, d, labels: -x)
    expected = -0.75 * targets.x_t / (1 - 0.75 * toys.per_row(targets.t))
    np.testing.assert_allclose(targets.target[rows], expected[rows], rtol=1e-5)
    # v = t at the start of each of four steps: (0 + 1/4 + 1/2 + 3/4) / 4 = 3/8.
    time = toys.linear_velocity(0, 1, 0, 0)
    targets, _ = make_targets(make_objective(reflow_steps=4), time)
    np.testing.assert_allclose(targets.target[rows], 0.375, rtol=1e-5)


def test_denoising_starts_at_the_noise_and_asks_for_the_flow_in_equal_steps():
    objective = make_objective(reflow_steps=5)
    targets, calls = spied(objective)
    rows = reflow_rows(objective)
    assert len(calls) == 5
    x0 = noise_of(objective, targets)[rows]
    np.testing.assert_allclose(calls[0][0], x0, rtol=1e-4, atol=1e-5)
    end = calls[-1][0] + VELOCITY(*calls[-1]) / 5
    np.testing.assert_allclose(end - calls[0][0], targets.target[rows], rtol=1e-4, atol=1e-5)
    for i, (_, t, d, labels) in enumerate(calls):
        np.testing.assert_allclose(t, i / 5, rtol=1e-6)
        np.testing.assert_array_equal(d, 0)
        np.testing.assert_array_equal(labels, np.arange(N)[rows])


def test_reflow_rows_lie_on_a_straight_path_that_knows_no_image():
    objective = make_objective(noise_floor=0.25)
    rows = reflow_rows(objective)
    targets, _ = make_targets(objective)
    others, _ = make_targets(objective, batch=make_batch(scale=-9.0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[rows], b[rows]), targets, others)
    assert (targets.target[~rows] != others.target[~rows]).all()


def test_reflow_rows_are_the_first_of_each_group_at_d_1():
    for changes, start in (({}, [1, 0, 0, 0]), ({"bootstrap_fraction": 0.375}, [1, 1, 1, 0, 0])):
        targets, _ = make_targets(make_objective(**changes))
        np.testing.assert_array_equal(targets.branch[: len(start)], start)
        rows = reflow_rows(make_objective(**changes))
        np.testing.assert_array_equal(targets.branch, rows)
        np.testing.assert_array_equal(targets.d, rows)
    assert LiveReflow(null_label=NULL).branches == ("empirical", "reflow")
    assert LiveReflow(null_label=NULL).bootstrap_fraction == 0.25
    assert LiveReflow(null_label=NULL).reflow_steps == 128  # full denoising


def test_fields_of_every_row():
    targets, _ = make_targets(make_objective())
    toys.assert_fields(targets, N, SHAPE)
    assert (targets.weight == 1).all()


def test_no_gradient_flows_through_the_denoising():
    objective, batch = make_objective(cfg_scale=2.0), make_batch()

    def loss(params):
        velocity = toys.linear_velocity(*params)
        draw = rng.draws(0, "train", 0)
        velocities = Velocities(velocity, velocity)
        targets, _ = objective.targets(draw, batch, velocities, PROGRESS)
        return jnp.sum(targets.target**2) + jnp.sum(targets.x_t**2)

    gradient = jax.jit(jax.grad(loss))(COEFFICIENTS)
    np.testing.assert_array_equal(np.asarray(gradient), 0)


# ---- guidance and labels -------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(3.0, -7), (1.0, 1), (0.0, 5)])
def test_the_denoising_is_guided_by_formula(scale, expected):
    # v = 1 for a label and 5 for the null label: guided by w = 3, 5 + 3 (1 - 5) = -7.
    def velocity(x, t, d, labels):
        return jnp.zeros_like(x) + toys.per_row(jnp.where(labels == NULL, 5.0, 1.0))

    objective = make_objective(cfg_scale=scale)
    targets, _ = make_targets(objective, velocity)
    np.testing.assert_allclose(targets.target[reflow_rows(objective)], expected, rtol=1e-5)


def test_every_step_of_the_denoising_is_guided():
    targets, calls = spied(make_objective(cfg_scale=3.0))
    rows = reflow_rows(make_objective())
    assert len(calls) == 4
    for x, t, d, labels in calls:
        conditional, twins = labels != NULL, labels == NULL
        np.testing.assert_array_equal(labels[conditional], np.arange(N)[rows])
        for a in (x, t, d):
            np.testing.assert_array_equal(a[conditional], a[twins])


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_labels_of_empirical_rows_are_dropped_and_of_reflow_rows_never(probability):
    objective = make_objective(class_dropout=probability, reflow_steps=1)
    labels = np.stack([make_targets(objective, index=i)[0].labels for i in range(8)])
    rows = reflow_rows(objective)
    assert (labels[:, rows] == np.arange(N)[rows]).all()
    dropped = labels[:, ~rows] == NULL
    tolerance = 4 * (probability * (1 - probability) / dropped.size) ** 0.5
    assert abs(dropped.mean() - probability) <= tolerance
    kept = np.broadcast_to(np.arange(N)[~rows], dropped.shape)[~dropped]
    np.testing.assert_array_equal(labels[:, ~rows][~dropped], kept)


def test_cfg_scale_0_trains_and_denoises_with_the_null_label_alone():
    targets, calls = spied(make_objective(cfg_scale=0.0))
    assert (targets.labels == NULL).all()
    assert all((labels == NULL).all() for _, _, _, labels in calls)


# ---- empirical rows, times and noise -------------------------------------------------------------


@pytest.mark.parametrize("noise_floor", [0.0, 0.25])
def test_empirical_rows_lie_on_the_path_to_their_image_and_regress_its_velocity(noise_floor):
    objective, keep = make_objective(noise_floor=noise_floor), 1 - noise_floor
    targets, _ = make_targets(objective)
    zeros, _ = make_targets(objective, batch=make_batch(scale=0.0))
    rows = ~reflow_rows(objective)
    x1, x0, t = np.asarray(make_batch().image), -zeros.target / keep, toys.per_row(targets.t)
    for actual, expected in (
        (targets.target, x1 - keep * x0),
        (targets.x_t, (1 - keep * t) * x0 + t * x1),
    ):
        np.testing.assert_allclose(actual[rows], expected[rows], rtol=1e-5, atol=1e-5)
    assert abs(x0[rows].mean()) < 0.21 and abs(x0[rows].std() - 1) < 0.15  # 4 errors of 384


def test_times_are_uniform_and_both_kinds_of_rows_draw_their_own():
    # As many rows of one kind as of the other: draws of one key would be the same.
    objective = make_objective(bootstrap_fraction=0.5, reflow_steps=1)
    rows = reflow_rows(objective)
    batch = make_batch(scale=0.0)
    steps = [make_targets(objective, batch=batch, index=i)[0] for i in range(8)]
    t = np.stack([step.t for step in steps])
    empirical = -np.concatenate([step.target[~rows] for step in steps]).ravel()
    reflow = np.concatenate([noise_of(objective, step)[rows] for step in steps]).ravel()
    for times in (t[:, rows].ravel(), t[:, ~rows].ravel()):
        assert times.min() >= 0 and times.max() < 1
        np.testing.assert_allclose(np.sort(times), np.linspace(0, 1, times.size), atol=0.06)
    pairs = [(t[:, rows], t[:, ~rows]), (empirical, reflow)]
    pairs += [(t[:, rows], reflow[: t.size // 2]), (t[:, ~rows], empirical[: t.size // 2])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.13


def test_times_on_a_grid_for_both_kinds_of_rows():
    targets, _ = make_targets(make_objective(flow_time_grid=16))
    rows = reflow_rows(make_objective())
    for kind in (rows, ~rows):
        steps = targets.t[kind] * 16
        np.testing.assert_array_equal(steps, np.rint(steps))
        assert len(set(steps)) > 12


def test_targets_are_a_function_of_seed_and_step():
    objective = make_objective(class_dropout=0.5)
    rows = reflow_rows(objective)
    one, _ = make_targets(objective)
    for num_shards in (1, 8):
        again, _ = make_targets(objective, num_shards=num_shards)
        jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets, _ = make_targets(objective, **other)
        for name in ("x_t", "t", "target"):
            for kind in (rows, ~rows):
                assert (getattr(targets, name)[kind] != getattr(one, name)[kind]).any()


# ---- cost, validation and sampling ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, 64 * 4),
        ({"cfg_scale": 0.0}, 64 * 4),
        ({"cfg_scale": 3.0}, 2 * 64 * 4),
        ({"bootstrap_fraction": 0.375, "reflow_steps": 3}, 96 * 3),
    ],
)
def test_target_evaluations_are_the_rows_passed_to_the_network(changes, by_hand):
    objective = make_objective(**changes)
    _, calls = spied(objective)
    assert sum(len(t) for _, t, _, _ in calls) == objective.target_evaluations(N) == by_hand


def test_bad_settings_are_refused():
    make_objective().validate(256, 8)
    with pytest.raises(UserError, match=r"batch_size=36 .*32.* 64\."):
        make_objective().validate(36, 8)
    with pytest.raises(UserError, match="objective.denoise_timesteps=100"):
        make_objective(denoise_timesteps=100).validate(256, 1)
    with pytest.raises(UserError, match="objective.bootstrap_fraction=1.5"):
        make_objective(bootstrap_fraction=1.5).validate(256, 1)


@pytest.mark.parametrize("m", [8, 128])
def test_sampling_in_m_steps_follows_the_guided_flow_and_in_fewer_the_straight_paths(m):
    objective = make_objective(denoise_timesteps=m, cfg_scale=3.0)
    for steps in range(1, 2 * m + 1):
        objective.check_steps(steps)
        asked = objective.query_size(jnp.full(1, 1.0 / steps)).item()
        assert (steps, asked) == (steps, 1 if steps < m else 0)
        assert (steps, objective.guided(steps)) == (steps, steps >= m)
    assert LiveReflow(null_label=NULL).denoise_timesteps == 128
    assert LiveReflow.uses_step_size and LiveReflow(null_label=NULL).num_levels == 7


@pytest.mark.parametrize("steps", [1, 2, 64, 128])
def test_a_step_moves_by_the_velocity_at_its_kind_of_path(steps):
    def velocity(x, t, d, labels):
        return x + toys.per_row(10 * t + 100 * d + 1000 * labels)

    objective = make_objective(denoise_timesteps=128)
    t, d = jnp.asarray([0.0, 1 - 1 / steps]), jnp.full(2, 1 / steps)
    end = objective.step(velocity, jnp.ones((2, *SHAPE)), t, d, jnp.asarray([0, 2]), unused)
    kind = 0 if steps == 128 else 100
    expected = 1 + np.array([1 + kind, 1 + kind + 10 * (1 - 1 / steps) + 2000]) / steps
    np.testing.assert_allclose(end[:, 0, 0, 0], expected, rtol=1e-6)
