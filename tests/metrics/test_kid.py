"""The kernel Inception distance: by hand, without bias, and of the subsets that are drawn."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.kid import kid, squared_mmd
from shortcut_jax.metrics.summaries import Rows
from tests.sentences import assert_sentence


def rows(values):
    result = Rows(len(values))
    result.update(values)
    return result


def test_two_rows_of_one_feature_by_hand():
    # k(a, b) = (a b + 1)^3: within {0, 1}: 1 each way; within {2, 3}: 343; across: 1, 1, 27, 64.
    assert squared_mmd([[0.0], [1.0]], [[2.0], [3.0]]) == pytest.approx(1 + 343 - 2 * 93 / 4)


def test_the_product_is_divided_by_the_number_of_features():
    # (2 / 2 + 1)^3 within x, (8 / 2 + 1)^3 within y, (4 / 2 + 1)^3 across.
    x, y = np.ones((3, 2)), np.full((4, 2), 2.0)
    assert squared_mmd(x, y) == pytest.approx(8 + 125 - 2 * 27)
    assert kid(rows(x), rows(y), 5, 3) == pytest.approx((79, 0), abs=1e-9)


def test_rows_do_not_count_as_their_own_neighbours():
    """The mean over all subsets of a finite set is exactly that of two draws from it: 0 bias."""
    values = np.array([[0.3, 2.0], [1.0, -1.0], [0.0, 0.5], [2.0, 1.0]])
    pairs = list(itertools.combinations(range(4), 2))
    kernel = (values @ values.T / 2 + 1) ** 3
    within = (kernel.sum() - np.trace(kernel)) / 12
    found = np.mean([squared_mmd(values[list(a)], values[list(b)]) for a in pairs for b in pairs])
    assert found == pytest.approx(2 * within - 2 * kernel.mean(), rel=1e-12)


def test_equal_distributions_are_around_zero_and_below_it_too():
    rng = np.random.default_rng(0)
    found = [squared_mmd(*rng.normal(size=(2, 40, 5))) for _ in range(300)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300)


def test_the_estimate_of_few_rows_is_not_larger():
    rng = np.random.default_rng(1)
    few = [squared_mmd(rng.normal(size=(5, 3)), 0.5 + rng.normal(size=(5, 3))) for _ in range(800)]
    many = [
        squared_mmd(rng.normal(size=(200, 3)), 0.5 + rng.normal(size=(200, 3))) for _ in range(20)
    ]
    assert abs(np.mean(few) - np.mean(many)) < 4 * np.std(few) / np.sqrt(800)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 2**32 - 1))
def test_symmetric_and_no_matter_in_which_order(m, n, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(m, 4)), 1 + rng.normal(size=(n, 4))
    found = squared_mmd(x, y)
    assert squared_mmd(y, x) == pytest.approx(found, rel=1e-10, abs=1e-10)
    assert squared_mmd(rng.permutation(x), y[::-1]) == pytest.approx(found, rel=1e-10, abs=1e-10)
    assert squared_mmd(x[:, ::-1], y[:, ::-1]) == pytest.approx(found, rel=1e-10, abs=1e-10)


def test_subsets_are_drawn_from_each_set_in_turn_without_replacement():
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=(n, 3)).astype(np.float32) for n in (9, 7))
    draws = np.random.RandomState(2020)
    expected = []
    for _ in range(6):
        of_x = draws.permutation(9)[:4]
        of_y = draws.permutation(7)[:4]
        expected.append(squared_mmd(x[of_x], y[of_y]))
    found = kid(rows(x), rows(y), 6, 4)
    assert found == (np.mean(expected), np.std(expected))
    assert kid(rows(x), rows(y), 6, 4, seed=3) != found


def test_subsets_as_large_as_the_sets_are_the_sets():
    x, y = np.random.default_rng(3).normal(size=(2, 8, 3)).astype(np.float32)
    mean, std = kid(rows(x), rows(y), 5, 8)
    assert mean == pytest.approx(squared_mmd(x, y), rel=1e-10) and std < 1e-10


@pytest.mark.parametrize(("samples", "reference", "what"), [(9, 20, "9 samples"), (20, 9, "9 ref")])
def test_too_few_rows_are_refused(samples, reference, what):
    with pytest.raises(UserError) as error:
        kid(rows(np.ones((samples, 2))), rows(np.ones((reference, 2))), 3, 10)
    assert_sentence(str(error.value), [what, "subsets of 10 images", "10 or more"])


def test_different_features_are_refused():
    with pytest.raises(UserError, match="3 and 2 features"):
        kid(rows(np.ones((4, 3))), rows(np.ones((4, 2))), 3, 2)


def test_large_features_in_float32_are_multiplied_in_float64():
    x, y = np.random.default_rng(4).integers(5000, 5100, size=(2, 20, 8))
    both = np.concatenate([x, y]).astype(object)  # whole numbers of any size
    kernel = (both @ both.T + 8) ** 3  # in units of 8^-3
    np.fill_diagonal(kernel, 0)
    within = kernel[:20, :20].sum() + kernel[20:, 20:].sum()
    across = ((x.astype(object) @ y.T + 8) ** 3).sum()
    expected = (within * 400 - 2 * across * 380) / (400 * 380) / 8**3
    found, _ = kid(rows(x), rows(y), 1, 20)
    assert abs(found - expected) < 1e-14 * kernel.max() / 8**3
