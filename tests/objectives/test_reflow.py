"""Reflow: flow matching whose noise is the one its image was made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng
from shortcut_jax.objectives import Batch, Progress, Velocities
from shortcut_jax.objectives.reflow import Reflow
from tests import toys

N = 1024
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)


def make_batch():
    # Noises that no generator draws: far from N(0, 1).
    numbers = np.random.default_rng(0)
    images = jnp.asarray(numbers.normal(size=(N, *SHAPE)), jnp.float32)
    noises = jnp.asarray(numbers.uniform(50, 90, size=(N, *SHAPE)), jnp.float32)
    return Batch(images, jnp.arange(N, dtype=jnp.int32), noises)


def make_targets(*, batch=None, draw=None, seed=0, index=0, **settings):
    def unused(*args):
        raise AssertionError("reflow asks no network for targets")

    objective = Reflow(null_label=NULL, **settings)
    draw = draw or rng.draws(seed, "train", index)
    velocities = Velocities(unused, unused, unused)
    targets, scalars = objective.targets(draw, batch or make_batch(), velocities, PROGRESS)
    return jax.tree.map(np.asarray, targets), scalars


def test_by_hand():
    # From noise 3 to image -1 in a straight line: v = -4 and x_t = 3 - 4t, of every row.
    image = jnp.ones((N, *SHAPE))
    batch = Batch(-image, jnp.zeros(N, jnp.int32), 3 * image)
    targets, scalars = make_targets(batch=batch)
    np.testing.assert_array_equal(targets.target, -4)
    expected = np.broadcast_to(toys.per_row(3 - 4 * targets.t), targets.x_t.shape)
    np.testing.assert_allclose(targets.x_t, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scalars["target_rms"], 4)


@pytest.mark.parametrize("noise_floor", [0.0, 0.25])
def test_rows_lie_between_the_noise_and_the_image_of_their_pair(noise_floor):
    batch, keep = make_batch(), 1 - noise_floor
    targets, _ = make_targets(batch=batch, noise_floor=noise_floor)
    x0, x1 = (np.asarray(a, np.float64) for a in (batch.noise, batch.image))
    t = toys.per_row(targets.t.astype(np.float64))
    np.testing.assert_allclose(targets.x_t, (1 - keep * t) * x0 + t * x1, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets.target, x1 - keep * x0, rtol=1e-5)


def test_no_noise_is_drawn():
    drawn = []

    def draw(name):
        drawn.append(name)
        return rng.stream(0, name, 0)

    make_targets(draw=draw)
    assert sorted(drawn) == ["dropout", "time"]


def test_fields_of_every_row():
    targets, _ = make_targets()
    toys.assert_fields(targets, N, SHAPE)
    assert (targets.d == 0).all() and (targets.weight == 1).all() and (targets.branch == 0).all()


def test_times_are_uniform_over_all_of_the_path():
    t = np.sort(make_targets()[0].t)
    assert t[0] >= 0 and t[-1] < 1 and len(np.unique(t)) > 1000
    np.testing.assert_allclose(t, np.linspace(0, 1, N), atol=0.06)


def test_the_authors_code_has_times_on_a_grid_a_noise_floor_and_dropout():
    objective = Reflow(null_label=NULL, **Reflow.authors_code)
    assert (objective.noise_floor, objective.class_dropout) == (1e-5, 0.1)
    steps = make_targets(**Reflow.authors_code)[0].t * 128
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert len(set(steps)) > 120 and steps.min() >= 0 and steps.max() < 128


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_labels_are_dropped_with_the_probability_independently_of_times(probability):
    targets, _ = make_targets(class_dropout=probability)
    dropped = targets.labels == NULL
    tolerance = 4 * (probability * (1 - probability) / N) ** 0.5
    assert abs(dropped.mean() - probability) <= tolerance
    np.testing.assert_array_equal(targets.labels[~dropped], np.arange(N)[~dropped])
    if tolerance:
        assert abs(np.corrcoef(dropped, targets.t)[0, 1]) < 0.14


def test_labels_are_kept_unless_told_otherwise():
    np.testing.assert_array_equal(make_targets(cfg_scale=3.0)[0].labels, np.arange(N))


def test_cfg_scale_0_trains_the_null_label_alone():
    assert (make_targets(cfg_scale=0.0)[0].labels == NULL).all()


def test_targets_are_a_function_of_seed_and_step():
    one, _ = make_targets(class_dropout=0.5)
    jax.tree.map(np.testing.assert_array_equal, make_targets(class_dropout=0.5)[0], one)
    for other in ({"index": 1}, {"seed": 1}):
        targets, _ = make_targets(class_dropout=0.5, **other)
        for name in ("t", "labels"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


def test_the_student_is_never_guided_and_moves_by_its_velocity():
    objective = Reflow(null_label=NULL, cfg_scale=3.0)
    assert not any(objective.guided(steps) for steps in (1, 2, 100, 128, 500))
    assert objective.teacher == "pairs" and not objective.uses_step_size
    assert objective.branches == ("reflow",) and objective.target_evaluations(64) == 0

    def velocity(x, t, d, labels):
        return x + toys.per_row(10 * t + 1000 * d + labels)

    x, labels = jnp.ones((2, *SHAPE)), jnp.asarray([0, 7])
    end = objective.step(velocity, x, jnp.asarray([0.0, 0.5]), jnp.full(2, 0.5), labels, None)
    # 1 + (1 + 0) / 2, and 1 + (1 + 5 + 7) / 2
    np.testing.assert_allclose(end[:, 0, 0, 0], [1.5, 7.5])
