"""Progressive distillation against numpy in float64, with a teacher of a closed form.

The teacher of most tests is v(x, t, label) = a x + b t + e label: asking it at a wrong point, time
or label changes the answer. Labels number the images. Every stage is one step long but where the
schedule is what is tested.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.base import sampling_velocity
from shortcut_jax.objectives.progressive_distillation import ProgressiveDistillation
from tests import toys

N = 256
NULL = 10_000
SHAPE = (1, 1, 2)
COEFFICIENTS = (0.7, -1.3, 0, 0.001)


def make_objective(**changes):
    return ProgressiveDistillation(null_label=NULL, **changes)


TEACHER = toys.linear_velocity(*COEFFICIENTS)


def unused(*args):
    raise AssertionError("only the teacher is asked for targets")


def make_batch(n=N, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(
    objective, *, stage=0, teacher=TEACHER, batch=None, progress=None, seed=0, index=0
):
    draw = rng.draws(seed, "train", index)
    velocities = Velocities(unused, unused, teacher)
    progress = progress or Progress(jnp.int32(stage), objective.num_stages)
    targets, _ = objective.targets(draw, batch or make_batch(), velocities, progress)
    return jax.tree.map(np.asarray, targets)


@functools.cache
def drawn_noise(noise_floor=0.0, stage=0, m=128):
    """The noise of the first step in float64: images of zeros leave x_t = (1 - (1-f) t) x_0."""
    objective = make_objective(noise_floor=noise_floor, denoise_timesteps=m)
    targets = make_targets(objective, stage=stage, batch=make_batch(scale=0.0))
    keep, t = 1 - noise_floor, targets.t.astype(np.float64)
    return targets.x_t / toys.per_row(1 - keep * t)


def spied(objective, stage, n=4):
    """Targets and the teacher's calls, operation by operation so that a branch is but one."""
    spy = toys.Spy(TEACHER)
    with jax.disable_jit():
        return make_targets(objective, stage=stage, teacher=spy, batch=make_batch(n)), spy.calls


# ---- targets -------------------------------------------------------------------------------------


def reference(objective, stage, t, x0, x1, labels):
    """x_t and the target from their definitions, in float64."""
    a, b, _, e = COEFFICIENTS
    m, w = objective.denoise_timesteps, objective.cfg_scale
    limit, keep = objective.bootstrap_clip or np.inf, 1 - objective.noise_floor
    if w == 0:
        labels = np.full(len(labels), NULL)

    def v(x, t):
        conditional = a * x + toys.per_row(b * t + e * labels)
        unconditional = a * x + toys.per_row(b * t + np.full(len(labels), e * NULL))
        return unconditional + w * (conditional - unconditional) if stage == 0 else conditional

    d = 2.0**stage / m  # of the teacher
    t = t.astype(np.float64)
    x = (1 - keep * toys.per_row(t)) * x0 + toys.per_row(t) * x1
    first = v(x, t)
    second = v(np.clip(x + d * first, -limit, limit), t + d)
    return x, (first + second) / 2


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg_scale": 3.0},
        {"cfg_scale": 0.0},
        {"bootstrap_clip": 0.8},
        {"noise_floor": 0.25},
        {"cfg_scale": 1.5, "bootstrap_clip": 0.8, "noise_floor": 0.25},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_targets_match_numpy(changes, stage):
    objective, batch = make_objective(denoise_timesteps=16, **changes), make_batch()
    targets = make_targets(objective, stage=stage, batch=batch)
    noise = drawn_noise(objective.noise_floor, stage, m=16)
    images, labels = np.asarray(batch.image, np.float64), np.asarray(batch.label)
    x_t, target = reference(objective, stage, targets.t, noise, images, labels)
    np.testing.assert_allclose(targets.x_t, x_t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets.target, target, rtol=1e-5, atol=3e-5)
    if objective.bootstrap_clip:  # of the state between the steps, not of the target
        without = make_targets(make_objective(denoise_timesteps=16), stage=stage)
        assert np.abs(without.target - targets.target).max() > 0.01
        assert np.abs(targets.target).max() > objective.bootstrap_clip


def test_targets_by_hand():
    # M = 4, v = 2x + t.
    objective, teacher = make_objective(denoise_timesteps=4), toys.linear_velocity(2, 1, 0, 0)
    # Stage 0 learns 1/2 from two steps of 1/4: v1 = 2x + t, x' = 1.5x + t/4,
    # v2 = 2x' + t + 1/4 = 3x + 1.5t + 0.25, mean 2.5x + 1.25t + 0.125.
    targets = make_targets(objective, stage=0, teacher=teacher)
    assert set(targets.t) == {0, 0.5} and set(targets.d) == {0.5}
    expected = 2.5 * targets.x_t + toys.per_row(1.25 * targets.t + 0.125)
    np.testing.assert_allclose(targets.target, expected, rtol=1e-5, atol=1e-5)
    # Stage 1 learns 1 from two steps of 1/2: v1 = 2x, x' = 2x, v2 = 4x + 1/2, mean 3x + 0.25.
    targets = make_targets(objective, stage=1, teacher=teacher)
    assert set(targets.t) == {0} and set(targets.d) == {1}
    np.testing.assert_allclose(targets.target, 3 * targets.x_t + 0.25, rtol=1e-5, atol=1e-5)


def test_students_that_learn_all_they_are_taught_make_m_steps_of_the_teacher_in_one():
    # m steps of the teacher dx/dt = x multiply x by (1 + 1/m)^m. Every perfect student is the
    # teacher of the next stage.
    m = 16
    objective = make_objective(denoise_timesteps=m)

    def student(steps):
        """The velocity that leads in one step where `steps` steps of 1/m lead."""
        return lambda x, t, d, labels: ((1 + 1 / m) ** steps - 1) * m / steps * x

    for stage in range(4):
        targets = make_targets(objective, stage=stage, teacher=student(2**stage))
        size = 2.0 ** (stage + 1) / m
        expected = student(2 ** (stage + 1))(targets.x_t, None, None, None)
        np.testing.assert_allclose(targets.target, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(targets.d, size)
    moved = objective.step(
        student(m), targets.x_t, jnp.zeros(N), jnp.ones(N), make_batch().label, unused
    )
    np.testing.assert_allclose(moved, (1 + 1 / m) ** m * targets.x_t, rtol=1e-5, atol=1e-6)


def test_the_second_step_starts_where_the_first_one_led():
    targets, (first, second) = spied(make_objective(denoise_timesteps=8), stage=1)
    np.testing.assert_array_equal(first[0], targets.x_t)
    np.testing.assert_array_equal(first[1], targets.t)
    led = targets.x_t + 0.25 * TEACHER(*first)
    np.testing.assert_allclose(second[0], led, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(second[1], targets.t + 0.25)


def test_no_gradient_flows_into_anything_the_network_is_shown():
    objective = make_objective(cfg_scale=2.0, bootstrap_clip=1.0)

    def total(parameters):
        def scaled(name):
            return lambda *args: parameters[name] * TEACHER(*args)

        velocities = Velocities(*map(scaled, ("online", "ema", "teacher")))
        targets, _ = objective.targets(
            rng.draws(0, "train", 0), make_batch(), velocities, Progress(jnp.int32(0), 7)
        )
        return sum(getattr(targets, name).sum() for name in ("x_t", "t", "d", "target", "weight"))

    parameters = {"online": 1.0, "ema": 1.0, "teacher": 1.0}
    assert abs(total(parameters) - total({**parameters, "teacher": 1.1})) > 0.1
    assert jax.grad(total)(parameters) == {"online": 0, "ema": 0, "teacher": 0}


# ---- stages --------------------------------------------------------------------------------------


def test_stages_double_the_step_to_learn():
    # 70 steps: seven stages of ten.
    objective = make_objective()
    assert objective.num_stages == 7
    size_of_step = {0: 1 / 64, 9: 1 / 64, 10: 1 / 32, 34: 1 / 8, 35: 1 / 8, 59: 1 / 2, 60: 1, 69: 1}
    for step, size in size_of_step.items():
        targets = make_targets(objective, progress=Progress(jnp.int32(step), 70))
        np.testing.assert_array_equal(targets.d, size)
        cells = targets.t / size
        np.testing.assert_array_equal(cells, np.floor(cells))
        assert cells.min() == 0 and cells.max() == 1 / size - 1
        name = f"distil_1_{round(1 / size)}"
        assert {objective.branches[branch] for branch in targets.branch} == {name}
    assert sorted(objective.branches) == sorted(f"distil_1_{2**i}" for i in range(7))


@pytest.mark.parametrize(("stage", "cells", "limit"), [(0, 16, 37.7), (2, 4, 16.3)])
def test_times_are_uniform_on_the_starts_of_the_steps_to_learn(stage, cells, limit):
    t = make_targets(make_objective(denoise_timesteps=32), stage=stage).t
    assert set(t) == {i / cells for i in range(cells)}
    counts = np.bincount((t * cells).astype(int))
    expected = N / cells
    assert ((counts - expected) ** 2 / expected).sum() < limit  # chi-square, p = 0.001


# ---- rows and labels -----------------------------------------------------------------------------


def test_fields_of_every_row():
    targets = make_targets(make_objective(cfg_scale=1.5), stage=2)
    image, row, integer = ("float32", (N, *SHAPE)), ("float32", (N,)), ("int32", (N,))
    expected = {"x_t": image, "target": image, "t": row, "d": row, "weight": row}
    expected |= {"labels": integer, "branch": integer}
    assert {name: (a.dtype.name, a.shape) for name, a in vars(targets).items()} == expected
    assert (targets.weight == 1).all()


@pytest.mark.parametrize("stage", [0, 1, 6])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_labels_are_never_dropped(stage, cfg_scale):
    targets = make_targets(make_objective(cfg_scale=cfg_scale), stage=stage)
    np.testing.assert_array_equal(targets.labels, np.arange(N))


@pytest.mark.parametrize("stage", [0, 1])
def test_cfg_scale_0_asks_and_trains_the_null_label_alone(stage):
    targets, calls = spied(make_objective(cfg_scale=0.0), stage)
    assert (targets.labels == NULL).all()
    assert len(calls) == 2 and all((labels == NULL).all() for *_, labels in calls)


def test_only_the_first_stage_asks_the_null_label_beside_the_own_one():
    objective = make_objective(cfg_scale=1.5, denoise_timesteps=4)
    _, calls = spied(objective, stage=0)
    assert [sorted(labels) for *_, labels in calls] == 2 * [[0, 1, 2, 3, NULL, NULL, NULL, NULL]]
    _, calls = spied(objective, stage=1)
    assert [list(labels) for *_, labels in calls] == 2 * [[0, 1, 2, 3]]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("m", [2, 8])
def test_target_evaluations_are_the_rows_the_teacher_is_asked_for(cfg_scale, m):
    objective, n = make_objective(cfg_scale=cfg_scale, denoise_timesteps=m), 4
    stages = [spied(objective, stage, n)[1] for stage in range(objective.num_stages)]
    asked = [sum(len(t) for _, t, *_ in calls) for calls in stages]
    assert objective.target_evaluations(n) == pytest.approx(np.mean(asked))
    # The first stage alone pays for guidance.
    first = 4 * n if cfg_scale == 1.5 else 2 * n
    assert asked == [first] + [2 * n] * (objective.num_stages - 1)


def test_noise_is_standard_normal_and_independent_of_the_times():
    targets, noise = make_targets(make_objective()), drawn_noise()
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.11
    assert len(np.unique(noise)) > 0.99 * noise.size
    # Draws of one key agree in order of the rows, whatever their shapes.
    pixels = [noise.ravel()[:N], noise[:, 0, 0, 0], noise[:, 0, 0, 1]]
    correlations = [np.corrcoef(targets.t, pixel)[0, 1] for pixel in pixels]
    assert np.abs(correlations).max() < 0.25


def test_targets_are_a_function_of_seed_and_step():
    objective = make_objective()
    one, again = make_targets(objective), make_targets(objective)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets = make_targets(objective, **other)
        for name in ("x_t", "t", "target"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


# ---- settings ------------------------------------------------------------------------------------


def test_it_distils_a_teacher_that_the_student_becomes():
    assert ProgressiveDistillation.teacher == "targets"
    assert ProgressiveDistillation.promotes_student
    assert ProgressiveDistillation.uses_guidance and not ProgressiveDistillation.uses_step_size
    defaults, released = make_objective(), make_objective(**ProgressiveDistillation.authors_code)
    assert (defaults.noise_floor, defaults.bootstrap_clip) == (0, 0)
    assert (released.noise_floor, released.bootstrap_clip) == (1e-5, 4)


@pytest.mark.parametrize("m", [-4, 0, 1, 100])
def test_validate_refuses_m_that_is_no_power_of_two(m):
    with pytest.raises(UserError, match=re.escape(f"denoise_timesteps={m} ")):
        make_objective(denoise_timesteps=m).validate(N, 1)


def test_validate_asks_for_equal_shards():
    make_objective().validate(12, 4)
    with pytest.raises(UserError, match="batch_size=13 .* is 16"):
        make_objective().validate(13, 4)


# ---- sampling rules ------------------------------------------------------------------------------


def test_step_counts_are_powers_of_two():
    objective = make_objective(denoise_timesteps=16)
    for steps in (1, 2, 4, 8, 16):
        objective.check_steps(steps)
    for steps in (-1, 0, 3, 12, 32):
        with pytest.raises(UserError, match=rf"holds {steps}; progressive distillation .*=16"):
            objective.check_steps(steps)


def test_sampling_is_euler_without_guidance():
    # v = 2x + t: from x = 3 at t = 1/4 by 1/2: 3 + (6 + 1/4) / 2.
    objective = make_objective(cfg_scale=1.5)
    assert not any(objective.guided(steps) for steps in (1, 2, 64, 128))
    spy = toys.Spy(toys.linear_velocity(2, 1, 0, 0))
    velocity = sampling_velocity(objective, spy, objective.guided(2))
    ones = jnp.ones(1)
    x = objective.step(
        velocity, 3 * jnp.ones((1, *SHAPE)), ones / 4, ones / 2, jnp.asarray([5]), unused
    )
    np.testing.assert_array_equal(x, np.full((1, *SHAPE), 6.125))
    ((_, t, d, labels),) = spy.calls
    assert (t, d, labels) == (0.25, 0, 5)
    np.testing.assert_array_equal(objective.query_size(jnp.asarray([1.0, 1 / 128])), 0)
