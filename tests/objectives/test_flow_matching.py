"""Flow matching: x_t and v of the straight path, times, label dropout, and its sampling rules."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.flow_matching import FlowMatching
from tests import toys

NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (2, 2, 1)


def make_batch(n, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(batch, *, seed=0, index=0, **settings):
    def unused(*args):
        raise AssertionError("flow matching asks no network for targets")

    objective = FlowMatching(null_label=NULL, **settings)
    draw = rng.draws(seed, "train", index)
    targets, scalars = objective.targets(draw, batch, Velocities(unused, unused), PROGRESS)
    return jax.tree.map(np.asarray, targets), scalars


@pytest.mark.parametrize("noise_floor", [0.0, 0.25])
def test_rows_lie_on_the_path_and_regress_its_velocity(noise_floor):
    # Images of zeros show the noise: v = -(1-f) x0. The same draw with images must then give
    # x_t = (1 - (1-f) t) x0 + t x1 and v = x1 - (1-f) x0.
    batch, keep = make_batch(1024), 1 - noise_floor
    targets, scalars = make_targets(batch, noise_floor=noise_floor)
    noise, _ = make_targets(make_batch(1024, scale=0.0), noise_floor=noise_floor)
    t, x0, x1 = targets.t[:, None, None, None], -noise.target / keep, np.asarray(batch.image)
    np.testing.assert_allclose(targets.x_t, (1 - keep * t) * x0 + t * x1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets.target, x1 - keep * x0, rtol=1e-5, atol=1e-6)
    rms = np.sqrt(np.mean(targets.target**2))
    np.testing.assert_allclose(scalars["target_rms"], rms, rtol=1e-5)


def test_path_by_hand():
    # x0 = 3 at t = 1/4 and x1 = -1: x_t = 0.75 * 3 - 0.25 = 2, v = -4.
    from shortcut_jax.objectives.common import interpolate

    image = jnp.ones((1, 1, 1, 1))
    x_t, v = interpolate(3 * image, -image, jnp.asarray([0.25]), 0.0)
    assert (x_t.item(), v.item()) == (2, -4)
    # With half of the noise kept at t = 1: x_t = (1 - 0.125) * 3 - 0.25, v = -1 - 1.5.
    x_t, v = interpolate(3 * image, -image, jnp.asarray([0.25]), 0.5)
    assert (x_t.item(), v.item()) == (2.375, -2.5)


def test_fields_of_every_row():
    targets, _ = make_targets(make_batch(1024))
    toys.assert_fields(targets, 1024, SHAPE)
    assert (targets.d == 0).all() and (targets.weight == 1).all() and (targets.branch == 0).all()
    assert FlowMatching(null_label=NULL).branches == ("empirical",)


def test_noise_is_standard_normal_and_independent_of_times_and_dropped_labels():
    noise, _ = make_targets(make_batch(1024, scale=0.0), class_dropout=0.3)
    x0 = -noise.target.ravel()
    assert abs(x0.mean()) < 0.06 and abs(x0.std() - 1) < 0.05
    assert len(np.unique(x0)) > 0.99 * x0.size
    # Draws of one key agree in order of the rows, whatever their shapes.
    correlations = np.corrcoef([noise.t, noise.labels == NULL, x0[:1024]])
    assert np.abs(correlations - np.eye(3)).max() < 0.14


def test_times_are_continuous_and_uniform():
    t = np.sort(make_targets(make_batch(1024))[0].t)
    assert t[0] >= 0 and t[-1] < 1 and len(np.unique(t)) > 1000
    np.testing.assert_allclose(t, np.linspace(0, 1, len(t)), atol=0.06)


def test_times_on_a_grid():
    steps = make_targets(make_batch(1024), flow_time_grid=16)[0].t * 16
    assert set(steps) == set(range(16))
    counts = np.bincount(steps.astype(int))
    assert ((counts - 64) ** 2 / 64).sum() < 37.7  # chi-square, 15 degrees, p = 0.001


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_with_the_probability(probability):
    labels = make_targets(make_batch(1024), class_dropout=probability)[0].labels
    dropped = labels == NULL
    tolerance = 4 * (probability * (1 - probability) / 1024) ** 0.5
    assert abs(dropped.mean() - probability) <= tolerance
    np.testing.assert_array_equal(labels[~dropped], np.arange(1024)[~dropped])


def test_cfg_scale_0_trains_the_null_label_alone():
    assert (
        make_targets(make_batch(1024), cfg_scale=0.0, class_dropout=0.0)[0].labels == NULL
    ).all()


def test_targets_are_a_function_of_seed_and_step():
    batch = make_batch(1024)
    one, _ = make_targets(batch, class_dropout=0.5)
    again, _ = make_targets(batch, class_dropout=0.5)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets, _ = make_targets(batch, class_dropout=0.5, **other)
        for name in ("x_t", "t", "labels"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


@settings(deadline=None)
@given(batch_size=st.integers(1, 500), num_shards=st.integers(1, 16))
def test_validate_names_the_smallest_batch_that_works(batch_size, num_shards):
    objective = FlowMatching(null_label=NULL)
    if batch_size % num_shards == 0:
        objective.validate(batch_size, num_shards)
        return
    with pytest.raises(UserError, match=f"batch_size={batch_size} ") as error:
        objective.validate(batch_size, num_shards)
    named = int(re.findall(r"\d+", str(error.value))[-1])
    assert named == next(n for n in itertools.count(batch_size) if n % num_shards == 0)


def test_sampling_rules():
    objective = FlowMatching(null_label=NULL, cfg_scale=2.0)
    for steps in (1, 3, 50, 1000):
        objective.check_steps(steps)
        assert objective.guided(steps)
    for steps in (0, -2):
        with pytest.raises(UserError, match=f"eval.steps holds {steps};"):
            objective.check_steps(steps)
    np.testing.assert_array_equal(objective.query_size(jnp.asarray([1.0, 0.1])), 0)
    assert not objective.uses_step_size
