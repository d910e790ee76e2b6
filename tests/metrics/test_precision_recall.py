"""Precision and recall of sets whose balls are known, with copies, in blocks, and the right way
round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import METRICS, check_count, precision_recall
from shortcut_jax.metrics.precision_recall import precision, recall, squared_radii
from shortcut_jax.metrics.protocols import INCEPTION
from shortcut_jax.metrics.summaries import Rows
from tests.sentences import assert_sentence


def rows(values):
    values = np.asarray(values, np.float32)
    result = Rows(len(values))
    result.update(values[:, None] if values.ndim == 1 else values)
    return result


def both(samples, reference, k=3):
    samples, reference = rows(samples), rows(reference)
    return precision(samples, reference, k), recall(samples, reference, k)


# ---- by hand -------------------------------------------------------------------------------------


def test_radii_reach_to_the_kth_nearest_other_row():
    line = rows([0, 1, 3, 7])
    assert squared_radii(line, 1).tolist() == [1, 1, 4, 16]
    assert squared_radii(line, 2).tolist() == [9, 4, 9, 36]
    assert squared_radii(line, 3).tolist() == [49, 36, 16, 49]


def test_precision_is_of_samples_and_recall_of_the_reference():
    # Balls of the reference reach from -1 to 2 and from 9 to 12, those of the samples, which are
    # all at 0 and 1, from -1 to 2.
    reference, samples = [0, 1, 10, 11], [0.25, 1.25, 0.5, 1.5]
    assert both(samples, reference, 1) == (1.0, 0.5)
    assert both(reference, samples, 1) == (0.5, 1.0)


def test_sets_far_apart_and_the_same_set():
    x = np.random.default_rng(0).normal(size=(30, 5))
    assert both(x, x + 100) == (0, 0)
    assert both(x, x) == (1, 1)
    assert both(x[::-1], x) == (1, 1)


def test_a_set_inside_another_covers_part_of_it():
    reference = np.arange(0.0, 20)  # balls of radius 1
    samples = np.linspace(8, 11, 10)  # balls of radius 1/3
    assert both(samples, reference, 1) == (1.0, 4 / 20)


def test_what_is_on_the_boundary_is_inside():
    assert both([3, 4], [0, 1], 1) == (0, 0)
    assert both([2, 3], [0, 1], 1) == (0.5, 0.5)
    # In a plane: 5 from the corner at the origin, whose nearest other row is 5 away.
    assert both([[-3, -4], [50, -500]], [[0, 0], [4, 3], [0, 100]], 1)[0] == 0.5


def test_a_ball_reaches_further_with_more_neighbours():
    reference = rows([0, 1, 2, 4])  # the ball of 4: radius 2, 3, 4
    samples = rows([6.5, 7.5, 40])
    found = [precision(samples, reference, k) for k in (1, 2, 3)]
    assert found == pytest.approx([0, 1 / 3, 2 / 3])


# ---- copies --------------------------------------------------------------------------------------


def noisy(n, seed=0, d=300):
    """Rows of many sizes of number, whose |u|^2 - 2 u.v + |v|^2 is noise for equal ones."""
    return np.exp(2 * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def test_copies_are_neighbours_at_distance_zero():
    x = noisy(50)
    assert not squared_radii(rows(np.concatenate([x, x])), 1).any()
    some = squared_radii(rows(np.concatenate([x, x[:20]])), 1)
    assert not some[:20].any() and not some[50:].any() and (some[20:50] > 100).all()
    assert (squared_radii(rows(np.concatenate([x, x])), 2) > 100).all()


def test_a_collapsed_model_has_balls_of_radius_zero_that_cover_copies_only():
    x = noisy(40)
    collapsed = np.tile(x[7], (25, 1))
    assert both(collapsed, x) == (1.0, 1 / 40)
    near = np.nextafter(collapsed, np.float32(np.inf))
    assert both(near, x) == (1.0, 0.0)  # inside the ball of image 7, which is not inside theirs
    assert (squared_radii(rows(near)) == 0).all()


def test_a_copy_of_the_reference_is_always_covered():
    x = noisy(50)
    samples = np.concatenate([x[:10], noisy(10, 1) + 1e5])
    assert both(samples, x)[0] == 0.5
    # Even of rows that have radius 0, one by one: no noise of another shape of matrix.
    four = np.repeat(x, 4, axis=0)
    assert both(four, x) == (1, 1) and both(x, four) == (1, 1)


def test_zero_and_minus_zero_are_equal():
    x = np.zeros((4, 3))
    assert both(-x, x) == (1, 1)
    assert squared_radii(rows(np.concatenate([x[:1], -x]))).tolist() == [0] * 5


# ---- in blocks, in any order ---------------------------------------------------------------------


def brute_force(samples, reference, k):
    """(precision, recall) from all differences, in float64."""
    samples, reference = (np.float64(np.float32(x)) for x in (samples, reference))

    def distances(a, b):
        return np.sqrt(((a[:, None] - b) ** 2).sum(axis=-1))

    def covered(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, k]
        return (distances(points, centres) <= radii).any(axis=1).mean()

    return covered(samples, reference), covered(reference, samples)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(4, 30),
    n=st.integers(4, 30),
    k=st.integers(1, 3),
    block=st.sampled_from([1, 3, 8, 100]),
    lattice=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_block_any_order_is_all_differences(m, n, k, block, lattice, seed):
    rng = np.random.default_rng(seed)
    # On a lattice of whole numbers there are copies and ties everywhere, and no rounding.
    draw = (
        (lambda c: rng.integers(0, 3, (c, 2))) if lattice else (lambda c: rng.normal(size=(c, 3)))
    )
    samples, reference = draw(m), draw(n)
    expected = brute_force(samples, reference, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_recall, "BLOCK", block)
        assert both(samples, reference, k) == expected
    assert both(rng.permutation(samples), rng.permutation(reference), k) == expected
    assert both(reference, samples, k) == expected[::-1]


def test_radii_that_are_known_are_taken():
    rng = np.random.default_rng(5)
    samples, reference = rows(rng.normal(size=(30, 2))), rows(rng.normal(size=(20, 2)))
    known = squared_radii(reference, 2)
    assert precision(samples, reference, radii=known) == precision(samples, reference, 2)
    assert precision(samples, reference, radii=0 * known) == 0
    assert recall(samples, reference, radii=squared_radii(samples, 2)) == recall(
        samples, reference, 2
    )


def test_memory_is_that_of_a_block(monkeypatch):
    """Matrices of distances are no larger than a block, so 50,000 rows fit."""
    shapes = []
    plain = precision_recall._squared_distances

    def spy(a, b):
        shapes.append((len(a), len(b)))
        return plain(a, b)

    monkeypatch.setattr(precision_recall, "_squared_distances", spy)
    monkeypatch.setattr(precision_recall, "BLOCK", 16)
    x = np.random.default_rng(6).normal(size=(70, 3))
    both(x, x + 1)
    assert max(max(shape) for shape in shapes) == 16
    # Of a set with itself half of the pairs: 5 blocks, 15 of 25.
    shapes.clear()
    squared_radii(rows(x))
    assert len(shapes) == 15


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(3, 3), (1, 1), (0, 3), (5, 0)])
def test_too_few_rows_for_the_neighbours_are_refused(n, k):
    with pytest.raises(UserError) as error:
        squared_radii(rows(np.ones((n, 2))), k)
    assert_sentence(str(error.value), [f"of {n} images", f"{k} neighbours", "use more"])


@pytest.mark.parametrize("name", ["precision", "recall"])
def test_what_cannot_be_measured_is_refused_before_it_is_drawn(name):
    enough, few = rows(np.arange(4)), rows(np.arange(3))
    check_count(name, enough.n, "eval.num_samples=4", {})
    METRICS[name].value(enough, enough, INCEPTION["adm"])
    with pytest.raises(UserError):
        METRICS[name].value(few, few, INCEPTION["adm"])
    with pytest.raises(UserError) as error:
        check_count(name, few.n, "eval.num_samples=3", {})
    assert_sentence(str(error.value), ["eval.num_samples=3", name, "4 or more"])


def test_no_samples_and_other_features_are_refused():
    reference = rows(np.ones((5, 2)))
    with pytest.raises(UserError, match="2 and 3 features"):
        recall(rows(np.ones((5, 3))), reference)
    with pytest.raises(UserError):
        precision(rows(np.ones((0, 2))), reference)
