"""Shortcut targets: empirical rows, and which image and label each row of the batch has."""

import jax
import numpy as np
import pytest

from tests import toys
from tests.objectives.shortcut_targets import (
    NULL,
    N,
    bootstrap_rows,
    chi_square,
    compiled_targets,
    make_batch,
    make_objective,
    make_targets,
    reference_target,
    sixteen_steps,
    spied_half_steps,
)

# ---- empirical rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_floor", [0.0, 0.25])
def test_every_row_lies_on_the_path_and_empirical_rows_regress_its_velocity(noise_floor):
    # Images of zeros show the noise: x_t = (1 - (1-f) t) x0 and v = -(1-f) x0. The same draw with
    # images adds t x1 and x1.
    objective = make_objective(noise_floor=noise_floor)
    targets = make_targets(objective)
    noise = make_targets(objective, make_batch(scale=0.0))
    flow, keep = ~bootstrap_rows(objective), 1 - noise_floor
    t, x0, x1 = toys.per_row(targets.t), -noise.target / keep, np.asarray(make_batch().image)
    np.testing.assert_allclose(noise.x_t[flow], ((1 - keep * t) * x0)[flow], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets.x_t - noise.x_t, t * x1, atol=1e-6)
    np.testing.assert_allclose(targets.target[flow], (x1 - keep * x0)[flow], rtol=1e-5, atol=1e-6)
    assert (targets.d[flow] == 0).all() and (targets.branch[flow] == 0).all()


@pytest.mark.parametrize("noise_floor", [0.0, 0.5])
def test_noise_is_standard_normal_in_both_kinds_of_rows(noise_floor):
    objective = make_objective(noise_floor=noise_floor)
    noise = sixteen_steps(objective, scale=0.0)
    x0 = noise.x_t / toys.per_row(1 - (1 - noise_floor) * noise.t)
    boot = bootstrap_rows(objective, len(x0))
    for rows in (boot, ~boot):
        assert abs(x0[rows].mean()) < 0.07
        assert abs(x0[rows].std() - 1) < 0.06
        assert abs(np.corrcoef(x0[rows].reshape(-1, 2).T)[0, 1]) < 0.1
    assert len(np.unique(x0)) > 0.99 * x0.size  # no two rows, nor two steps, share any


def test_the_two_kinds_of_rows_share_neither_noise_nor_times():
    # The released code draws both from one key; half and half, the shapes are the same, too.
    objective = make_objective(bootstrap_fraction=0.5, reuse_images=True)
    noise = compiled_targets(objective, make_batch(scale=0.0))
    x0 = (noise.x_t / toys.per_row(1 - noise.t)).reshape(-1, 2, 2)
    assert abs(np.corrcoef(x0[:, 0].ravel(), x0[:, 1].ravel())[0, 1]) < 0.25
    assert abs(np.corrcoef(noise.t.reshape(-1, 2).T)[0, 1]) < 0.35


def test_noise_times_and_dropped_labels_are_drawn_independently():
    # Draws of one key agree in order of the rows of a step, whatever their shapes.
    objective = make_objective(class_dropout=0.3, bootstrap_label_dropout=True)
    noise, boot = sixteen_steps(objective, scale=0.0), bootstrap_rows(objective, 16 * N)
    for kind in (boot, ~boot):
        t, dropped = noise.t[kind].reshape(16, -1), noise.labels[kind].reshape(16, -1) == NULL
        x0 = noise.x_t[kind] / toys.per_row(1 - noise.t[kind])
        x0 = x0.reshape(16, -1)[:, : t.shape[1]]
        correlations = np.corrcoef([t.ravel(), dropped.ravel(), x0.ravel()])
        assert np.abs(correlations - np.eye(3)).max() < 4.5 * t.size**-0.5


def test_flow_times_are_continuous_and_uniform_on_0_1():
    objective = make_objective()
    targets = sixteen_steps(objective)
    t = np.sort(targets.t[~bootstrap_rows(objective, 16 * N)])
    assert t[0] >= 0 and t[-1] < 1 and len(np.unique(t)) > 3000
    np.testing.assert_allclose(t, np.linspace(0, 1, len(t)), atol=0.04)


def test_flow_times_on_a_grid():
    objective = make_objective(flow_time_grid=128)
    places = sixteen_steps(objective).t[~bootstrap_rows(objective, 16 * N)] * 128
    assert set(places) == set(range(128))
    assert chi_square(np.bincount(places.astype(int))) < 181  # 127 degrees, p = 0.001


# ---- rows, images and labels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "p", "q", "n"),
    [(3 / 8, 3, 8, 64), (1 / 3, 1, 3, 21)],
)
def test_the_first_p_of_every_q_rows_bootstrap(fraction, p, q, n):
    objective = make_objective(bootstrap_fraction=fraction)
    objective.validate(n, 1)
    targets = compiled_targets(objective, make_batch(n))
    boot = np.arange(n) % q < p
    np.testing.assert_array_equal(targets.d > 0, boot)
    np.testing.assert_array_equal(targets.branch > 0, boot)
    expected = reference_target(objective, targets, (0.7, -1.3, 0.9, 0.001))
    np.testing.assert_allclose(targets.target[boot], expected[boot], rtol=1e-5, atol=2e-5)
    # Each image is used exactly once, by the row it came in.
    np.testing.assert_array_equal(targets.labels, np.arange(n))
    assert (targets.weight == 1).all()


@pytest.mark.parametrize(
    ("fraction", "image_of_row"), [(1 / 4, [0, 0, 1, 2]), (1 / 8, [0, 0, 1, 2, 3, 4, 5, 6])]
)
def test_reuse_images_gives_both_kinds_of_rows_the_first_images(fraction, image_of_row):
    objective = make_objective(bootstrap_fraction=fraction, reuse_images=True)
    targets, noise = (make_targets(objective, make_batch(scale=scale)) for scale in (1, 0))
    images = np.add.outer(np.arange(0, N, len(image_of_row)), image_of_row).ravel()
    np.testing.assert_array_equal(targets.labels, images)
    expected = toys.per_row(targets.t) * make_batch().image[images]
    np.testing.assert_allclose(targets.x_t - noise.x_t, expected, atol=1e-6)


def test_reuse_images_with_several_bootstrap_rows_in_a_group():
    objective = make_objective(bootstrap_fraction=3 / 8, reuse_images=True)
    labels = compiled_targets(objective, make_batch(16)).labels
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 3, 4, 8, 9, 10, 8, 9, 10, 11, 12])


@pytest.mark.parametrize("bootstrap_too", [False, True])
def test_label_dropout(bootstrap_too):
    objective = make_objective(class_dropout=0.3, bootstrap_label_dropout=bootstrap_too)
    labels, boot = sixteen_steps(objective).labels, bootstrap_rows(objective, 16 * N)
    dropped = labels == NULL
    assert abs(dropped[~boot].mean() - 0.3) < 0.035
    if bootstrap_too:
        assert abs(dropped[boot].mean() - 0.3) < 0.06
    else:
        assert not dropped[boot].any()
    np.testing.assert_array_equal(labels[~dropped], np.tile(np.arange(N), 16)[~dropped])


def test_a_dropped_bootstrap_label_is_dropped_in_the_half_steps_too():
    targets, _, first, second = spied_half_steps(class_dropout=1.0, bootstrap_label_dropout=True)
    assert all((labels == NULL).all() for labels in (targets.labels, first[3], second[3]))


def test_cfg_scale_0_trains_the_null_label_alone():
    targets, _, first, second = spied_half_steps(cfg_scale=0.0)
    assert all((labels == NULL).all() for labels in (targets.labels, first[3], second[3]))


def test_targets_are_a_function_of_seed_and_step():
    objective = make_objective(class_dropout=0.5)
    one, again = make_targets(objective), make_targets(objective)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets = make_targets(objective, **other)
        for name in ("x_t", "t", "labels", "d"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)
