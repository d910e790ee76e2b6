"""Consistency training and distillation: targets, times, stages, rows, labels and settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Batch, Progress, Velocities
from shortcut_jax.objectives.consistency_distillation import ConsistencyDistillation
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from tests import toys
from tests.objectives.consistency_targets import (
    EMA,
    EMA_COEFFICIENTS,
    NULL,
    SHAPE,
    TEACHER,
    TEACHER_COEFFICIENTS,
    N,
    both_methods,
    drawn_noise,
    make_batch,
    make_targets,
    spied,
)

# ---- targets -------------------------------------------------------------------------------------


def reference(method, t, x0, x1, *, stage, m, cfg_scale=1.0, noise_floor=0.0, bootstrap_clip=0.0):
    """x_t and the target from their definitions, in float64."""
    labels = np.full(N, NULL) if cfg_scale == 0 else np.arange(N)
    limit = bootstrap_clip or np.inf

    def ask(coefficients, x, t):
        a, b, _, e = coefficients
        return a * x + toys.per_row(b * t + e * labels)

    def path(t):
        return (1 - (1 - noise_floor) * toys.per_row(t)) * x0 + toys.per_row(t) * x1

    x_t = path(t)
    if method is ConsistencyTraining:
        t_next = t + 2.0**-stage
        x_next = path(t_next)
    else:
        t_next = t + 1 / m
        x_next = np.clip(x_t + ask(TEACHER_COEFFICIENTS, x_t, t) / m, -limit, limit)
    end = x_next + toys.per_row(1 - t_next) * ask(EMA_COEFFICIENTS, x_next, t_next)
    return x_t, (end - x_t) / toys.per_row(1 - t)


@pytest.mark.parametrize(
    ("method", "stage", "changes"),
    [
        (ConsistencyTraining, 0, {}),
        (ConsistencyTraining, 1, {}),
        (ConsistencyTraining, 3, {}),
        (ConsistencyTraining, 3, {"cfg_scale": 0.0}),
        (ConsistencyTraining, 3, {"noise_floor": 0.25}),
        (ConsistencyDistillation, 0, {}),
        (ConsistencyDistillation, 0, {"cfg_scale": 0.0}),
        (ConsistencyDistillation, 0, {"noise_floor": 0.25}),
        (ConsistencyDistillation, 0, {"bootstrap_clip": 0.8, "noise_floor": 0.25}),
    ],
)
def test_targets_match_numpy(method, stage, changes):
    targets, _ = make_targets(method, stage=stage, denoise_timesteps=16, **changes)
    noise = drawn_noise(method, stage=stage, denoise_timesteps=16, **changes)
    image, t = np.asarray(make_batch().image, np.float64), targets.t.astype(np.float64)
    x_t, target = reference(method, t, noise, image, stage=stage, m=16, **changes)
    np.testing.assert_allclose(targets.x_t, x_t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets.target, target, rtol=2e-5, atol=1e-4)


def test_training_by_hand():
    # M = 4, v_ema = 2x + t.
    settings = {"denoise_timesteps": 4, "ema": toys.linear_velocity(2, 1, 0, 0)}
    x0, x1 = drawn_noise(ConsistencyTraining), np.asarray(make_batch().image)
    # One bin: from the noise to the image.
    targets, _ = make_targets(ConsistencyTraining, stage=0, **settings)
    assert set(targets.t) == {0}
    np.testing.assert_allclose(targets.x_t, x0, rtol=1e-6)
    np.testing.assert_allclose(targets.target, x1 - x0, rtol=1e-5, atol=1e-6)
    # Two bins. From t = 0 to the middle x' = (x0 + x1) / 2, where v = x0 + x1 + 1/2 leads to
    # f = x0 + x1 + 1/4, that is v = x1 + 1/4. From t = 1/2 to the image: v = x1 - x0.
    targets, _ = make_targets(ConsistencyTraining, stage=1, **settings)
    assert set(targets.t) == {0, 0.5}
    expected = np.where(toys.per_row(targets.t) == 0, x1 + 0.25, x1 - x0)
    np.testing.assert_allclose(targets.target, expected, rtol=1e-5, atol=1e-5)


def test_distillation_by_hand():
    # M = 2, v_teacher = 2x + 4t, v_ema = 6x + t.
    teacher, ema = toys.linear_velocity(2, 4, 0, 0), toys.linear_velocity(6, 1, 0, 0)
    targets, _ = make_targets(
        ConsistencyDistillation, denoise_timesteps=2, teacher=teacher, ema=ema
    )
    assert set(targets.t) == {0, 0.5}
    # From t = 0: x' = x + x = 2x, where v = 12x + 1/2 leads to f = 8x + 1/4: v = 7x + 1/4.
    # From t = 1/2: x' = x + (2x + 2) / 2 = 2x + 1 at the end, f = x': v = (x + 1) / (1/2).
    x = targets.x_t
    expected = np.where(toys.per_row(targets.t) == 0, 7 * x + 0.25, 2 * x + 2)
    np.testing.assert_allclose(targets.target, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 6])
def test_training_ends_in_the_data_itself_whatever_the_network_says(stage):
    def wrong(x, t, d, labels):
        return jnp.full_like(x, 1e3)

    targets, _ = make_targets(ConsistencyTraining, stage=stage, ema=wrong)
    last = targets.t + 0.5**stage == 1
    assert last.any() and last.all() == (stage == 0)
    end = targets.x_t + toys.per_row(1 - targets.t) * targets.target
    np.testing.assert_allclose(end[last], make_batch().image[last], rtol=1e-5, atol=1e-5)
    assert (np.abs(end[~last]) > 10).all()


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_training_asks_the_ema_further_on_the_path_of_the_same_pair(stage):
    targets, (x_next, t_next, d, labels) = spied(ConsistencyTraining, stage=stage)
    np.testing.assert_array_equal(t_next, targets.t + 0.5**stage)
    x0, x1 = drawn_noise(ConsistencyTraining, stage=stage), make_batch().image
    expected = toys.per_row(1 - t_next) * x0 + toys.per_row(t_next) * x1
    np.testing.assert_allclose(x_next, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d, 0)
    np.testing.assert_array_equal(labels, np.arange(N))


@pytest.mark.parametrize("m", [4, 128])
def test_distillation_asks_the_ema_one_euler_step_of_the_teacher_on(m):
    targets, from_ema, from_teacher = spied(ConsistencyDistillation, denoise_timesteps=m)
    asked = (targets.x_t, targets.t, np.zeros(N), np.arange(N))
    for found, expected in zip(from_teacher, asked, strict=True):
        np.testing.assert_array_equal(found, expected)
    x_next = targets.x_t + TEACHER(*from_teacher) / m
    np.testing.assert_allclose(from_ema[0], x_next, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(from_ema[1], targets.t + 1 / m)
    np.testing.assert_array_equal(from_ema[2], 0)
    np.testing.assert_array_equal(from_ema[3], np.arange(N))


def test_distillation_clips_the_neighbour_alone():
    settings = {"bootstrap_clip": 0.5, "denoise_timesteps": 8}
    targets, (x_next, *_), _ = spied(ConsistencyDistillation, **settings)
    assert np.abs(x_next).max() == 0.5
    assert np.abs(targets.x_t).max() > 1 and np.abs(targets.target).max() > 1


@both_methods
def test_a_network_that_knows_the_end_is_told_to_go_on(method):
    # All paths end in x1 = 3: v = (3 - x) / (1 - t) answers what it is asked to learn.
    def to_three(x, t, d, labels):
        return (3 - x) / toys.per_row(jnp.maximum(1 - t, 1e-9))

    batch = Batch(jnp.full((N, *SHAPE), 3.0), jnp.arange(N))
    targets, _ = make_targets(method, ema=to_three, teacher=to_three, stage=6, batch=batch)
    expected = to_three(targets.x_t, targets.t, None, None)
    np.testing.assert_allclose(targets.target, expected, rtol=1e-4, atol=1e-4)


@both_methods
def test_no_gradient_flows_into_anything_the_network_is_shown(method):
    def total(parameters):
        def scaled(name, velocity):
            return lambda *args: parameters[name] * velocity(*args)

        velocities = Velocities(
            scaled("online", EMA), scaled("ema", EMA), scaled("teacher", TEACHER)
        )
        targets, _ = method(null_label=NULL).targets(
            rng.draws(0, "train", 0), make_batch(), velocities, Progress(jnp.int32(3), 7)
        )
        return sum(getattr(targets, name).sum() for name in ("x_t", "t", "d", "target", "weight"))

    parameters = {"online": 1.0, "ema": 1.0, "teacher": 1.0}
    for name in ("ema", "teacher")[: 1 if method is ConsistencyTraining else 2]:
        assert abs(total(parameters) - total({**parameters, name: 1.1})) > 0.1
    assert jax.grad(total)(parameters) == {"online": 0, "ema": 0, "teacher": 0}


# ---- times and stages ----------------------------------------------------------------------------


def test_training_doubles_the_bins_in_every_stage():
    # 70 steps: seven stages of ten.
    assert ConsistencyTraining(null_label=NULL).num_stages == 7
    bins_at = {0: 1, 9: 1, 10: 2, 19: 2, 20: 4, 34: 8, 35: 8, 59: 32, 60: 64, 69: 64}
    for step, bins in bins_at.items():
        progress = Progress(jnp.int32(step), 70)
        targets, scalars = make_targets(ConsistencyTraining, progress=progress)
        assert scalars["sections"] == bins
        index = targets.t * bins
        np.testing.assert_array_equal(index, np.floor(index))
        assert index.min() == 0 and index.max() == bins - 1
        # The neighbour is the start of the next bin.
        _, (_, t_next, *_) = spied(ConsistencyTraining, progress=progress)
        np.testing.assert_array_equal(t_next * bins, index + 1)


def test_distillation_has_one_stage():
    assert ConsistencyDistillation(null_label=NULL).num_stages == 1
    first, *others = (
        make_targets(ConsistencyDistillation, progress=Progress(jnp.int32(step), 70))[0]
        for step in (0, 35, 69)
    )
    for targets in others:
        jax.tree.map(np.testing.assert_array_equal, targets, first)
    cells = first.t * 128
    np.testing.assert_array_equal(cells, np.floor(cells))
    assert cells.min() < 4 and cells.max() > 123 and len(set(cells)) > 90


@both_methods
def test_times_are_uniform(method):
    # Sixteen cells: the finest of M = 16 in distillation, the last stage of M = 32 in training.
    m = 32 if method is ConsistencyTraining else 16
    t = make_targets(method, denoise_timesteps=m, stage=4)[0].t
    assert set(t) == {i / 16 for i in range(16)}
    counts = np.bincount((t * 16).astype(int))
    assert ((counts - 16) ** 2 / 16).sum() < 37.7  # chi-square, 15 degrees, p = 0.001


# ---- rows and labels -----------------------------------------------------------------------------


@both_methods
def test_fields_of_every_row(method):
    targets, _ = make_targets(method)
    image, row, integer = ("float32", (N, *SHAPE)), ("float32", (N,)), ("int32", (N,))
    expected = {"x_t": image, "target": image, "t": row, "d": row, "weight": row}
    expected |= {"labels": integer, "branch": integer}
    assert {name: (a.dtype.name, a.shape) for name, a in vars(targets).items()} == expected
    assert (targets.d == 0).all() and (targets.weight == 1).all() and (targets.branch == 0).all()
    assert method(null_label=NULL).branches == ("consistency",)
    np.testing.assert_array_equal(targets.labels, np.arange(N))


@both_methods
def test_cfg_scale_0_asks_and_trains_the_null_label_alone(method):
    targets, *calls = spied(method, cfg_scale=0.0)
    assert (targets.labels == NULL).all()
    assert len(calls) == (1 if method is ConsistencyTraining else 2)
    assert all((labels == NULL).all() for *_, labels in calls)


@both_methods
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_target_evaluations_are_the_rows_the_networks_are_asked_for(method, cfg_scale):
    _, *calls = spied(method, cfg_scale=cfg_scale, stage=1)
    asked = sum(len(t) for _, t, *_ in calls)
    assert method(null_label=NULL, cfg_scale=cfg_scale).target_evaluations(N) == asked


@both_methods
def test_noise_is_standard_normal_and_independent_of_the_times(method):
    noise, targets = drawn_noise(method, stage=6), make_targets(method, stage=6)[0]
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.11
    assert len(np.unique(noise)) > 0.99 * noise.size
    # Draws of one key agree in order of the rows, whatever their shapes.
    pixels = [noise.ravel()[:N], noise[:, 0, 0, 0], noise[:, 0, 0, 1]]
    correlations = [np.corrcoef(targets.t, pixel)[0, 1] for pixel in pixels]
    assert np.abs(correlations).max() < 0.25


@both_methods
def test_targets_are_a_function_of_seed_and_step(method):
    one, again = make_targets(method, stage=3)[0], make_targets(method, stage=3)[0]
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets, _ = make_targets(method, stage=3, **other)
        for name in ("x_t", "t", "target"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


# ---- settings ------------------------------------------------------------------------------------


def test_who_has_a_teacher():
    assert ConsistencyTraining.teacher == "none"
    assert ConsistencyDistillation.teacher == "targets"
    for method in (ConsistencyTraining, ConsistencyDistillation):
        assert not method.uses_guidance
        assert not method.uses_step_size
        assert not method.promotes_student


def test_the_released_code():
    training, distillation = (
        method(null_label=NULL, **method.authors_code)
        for method in (ConsistencyTraining, ConsistencyDistillation)
    )
    assert (training.noise_floor, training.sampler) == (1e-5, "renoise")
    assert (distillation.noise_floor, distillation.sampler) == (1e-5, "euler")
    assert distillation.bootstrap_clip == 4


@both_methods
@pytest.mark.parametrize("m", [-4, 0, 1, 100])
def test_validate_refuses_m_that_is_no_power_of_two(method, m):
    with pytest.raises(UserError, match=re.escape(f"denoise_timesteps={m} ")):
        method(null_label=NULL, denoise_timesteps=m).validate(N, 1)


@both_methods
def test_validate_asks_for_equal_shards(method):
    method(null_label=NULL).validate(12, 4)
    with pytest.raises(UserError, match="batch_size=13 .* is 16"):
        method(null_label=NULL).validate(13, 4)
