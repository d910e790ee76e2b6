"""Summaries: storing one changes no bit, cutting batches changes nothing, all is in its place."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.summaries import Marginals, Moments, Rows
from tests.sentences import assert_sentence

MAKE = {
    "moments": lambda total: Moments(),
    "rows": lambda total: Rows(total),
    "some_rows": lambda total: Rows(total, max(1, total // 3)),
    "marginals": lambda total: Marginals(total, min(total, 3)),
}


def data(total, width=4, seed=0):
    return np.random.default_rng(seed).normal(size=(total, width)).astype(np.float32)


def fill(summary, values, cuts):
    for part in np.split(values, sorted(cuts)):
        summary.update(part)
    return summary


def stored(summary):
    """What comes back from a file."""
    file = io.BytesIO()
    np.savez(file, **summary.arrays())
    file.seek(0)
    with np.load(file) as arrays:
        return type(summary).from_arrays({name: arrays[name] for name in arrays.files})


def assert_same(a, b):
    a, b = a.arrays(), b.arrays()
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        np.testing.assert_array_equal(array, b[name], err_msg=name)


cut = st.integers(1, 30).flatmap(
    lambda total: st.tuples(st.just(total), st.lists(st.integers(0, total), max_size=6))
)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@settings(max_examples=40, deadline=None)
@given(cut=cut)
def test_stored_after_every_batch_it_goes_on_with_the_same_bits(make, cut):
    total, cuts = cut
    values = data(total)
    straight, stopped = make(total), stored(make(total))
    for part in np.split(values, sorted(cuts)):
        straight.update(part)
        stopped.update(part)
        stopped = stored(stopped)
        assert stopped.n == straight.n
    assert_same(straight, stopped)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@settings(max_examples=40, deadline=None)
@given(cut=cut)
def test_batches_may_be_cut_anywhere(make, cut):
    total, cuts = cut
    values = data(total) + 3
    whole, parts = make(total), fill(make(total), values, cuts)
    whole.update(values)
    assert whole.n == parts.n == total
    if isinstance(whole, Rows):
        np.testing.assert_array_equal(whole.rows, parts.rows)
    elif isinstance(whole, Marginals):
        for found, expected in zip(parts.means, whole.means, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
    elif total > 1:
        np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(parts.cov, whole.cov, rtol=0, atol=1e-12 * np.trace(whole.cov))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_was_stored_does_not_change_when_it_goes_on(make):
    summary, values = make(9), data(9)
    summary.update(values[:5])
    arrays = summary.arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    summary.update(values[5:])
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)
    again = type(summary).from_arrays(arrays)  # and going on from it does not either
    again.update(values[5:])
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_and_leave_no_trace(make, bad):
    summary, values = make(5), data(5)
    summary.update(values[:2])
    before = type(summary).from_arrays(summary.arrays())
    values[3, 1] = bad
    with pytest.raises(UserError) as error:
        summary.update(values[2:])
    assert_sentence(str(error.value), ["1 of 3 samples", "NaN or infinite", "check the model"])
    assert_same(summary, before)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 4, 1)])
def test_another_shape_is_refused(make, shape):
    summary = make(9)
    summary.update(data(4))
    with pytest.raises(ValueError, match=r"\[n, 4\]"):
        summary.update(np.zeros(shape))


@pytest.mark.parametrize("make", [MAKE["rows"], MAKE["marginals"]])
def test_more_than_expected_are_refused_and_fewer_are_not_read(make):
    summary = make(5)
    summary.update(data(4))
    with pytest.raises(ValueError, match="expected 5 .*got 6"):
        summary.update(data(2))
    with pytest.raises(ValueError, match="only 4"):
        _ = summary.rows if isinstance(summary, Rows) else summary.means


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 50, 60])
def test_all_rows_are_kept_in_order(limit):
    values, rows = data(50), Rows(50, limit)
    fill(rows, values, [7, 8, 31])
    assert rows.rows.dtype == np.float32
    np.testing.assert_array_equal(rows.rows, values)


def test_a_limit_keeps_a_draw_without_replacement_in_order():
    total, limit = 1000, 100
    places = np.arange(total)[:, None]
    kept = fill(Rows(total, limit), places, range(0, total, 77)).rows[:, 0]
    assert len(np.unique(kept)) == limit and (np.diff(kept) > 0).all()
    # Uniform over the whole: 4 of its deviations of 25 rows per quarter, mean within 4 of 28.
    assert (np.abs(np.histogram(kept, 4, (0, total))[0] - 25) < 17).all()
    assert abs(kept.mean() - 500) < 110
    # Fixed for good: a stored reference was drawn so.
    np.testing.assert_array_equal(kept[:6], [0, 21, 38, 43, 54, 66])


def test_the_draw_is_larger_with_a_larger_limit():
    places = np.arange(40)[:, None]
    small, large = (set(fill(Rows(40, n), places, []).rows[:, 0]) for n in (5, 20))
    assert small < large


def test_the_rows_have_one_place_in_memory():
    rows, values = Rows(6, 4), data(6)
    rows.update(values[:3])
    place = rows._rows
    rows.update(values[3:])
    assert rows.rows is place and place.shape == (4, 4)
    assert np.shares_memory(rows.arrays()["rows"], place)
    assert np.shares_memory(Rows.from_arrays(rows.arrays()).rows, place)  # complete: not copied


@pytest.mark.parametrize(("total", "limit"), [(-1, None), (5, 0)])
def test_sizes_that_make_no_sense_are_refused(total, limit):
    with pytest.raises(ValueError, match="limit >= 1"):
        Rows(total, limit)


# ---- marginals -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 60), splits=st.integers(1, 12))
def test_splits_are_those_of_torch_fidelity(total, splits):
    if splits > total:
        with pytest.raises(UserError):
            Marginals(total, splits)
        return
    # Each sample is sure of a class of its own, so that p tells the samples of a split.
    marginals = fill(Marginals(total, splits), 1000 * np.eye(total), [total // 3])
    p, p_log_p = marginals.means
    for i in range(splits):
        chunk = np.arange(total)[i * total // splits : (i + 1) * total // splits]
        assert np.flatnonzero(p[i]).tolist() == chunk.tolist()
        np.testing.assert_allclose(p[i, chunk], 1 / len(chunk), rtol=1e-15)
    np.testing.assert_array_equal(p_log_p, 0)


def test_means_are_those_of_the_softmax():
    values = 5 * data(20, 6)
    p = np.exp(np.float64(values))
    p /= p.sum(axis=1, keepdims=True)
    found, found_p_log_p = fill(Marginals(20, 2), values, [3, 14]).means
    np.testing.assert_allclose(found, [p[:10].mean(axis=0), p[10:].mean(axis=0)], rtol=1e-14)
    entropies = (p * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(
        found_p_log_p, [entropies[:10].mean(), entropies[10:].mean()], rtol=1e-13
    )


def test_large_logits_neither_overflow_nor_lose_the_rest():
    values = 1e4 + np.array([[0.0, 1.0], [-3e4, 0.0]])
    p, p_log_p = fill(Marginals(2, 2), values, []).means
    expected = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(p, [[1 - expected, expected], [0, 1]], rtol=1e-12)
    np.testing.assert_allclose(
        p_log_p,
        [expected * np.log(expected) + (1 - expected) * np.log(1 - expected), 0],
        rtol=1e-12,
    )


@pytest.mark.parametrize(("total", "splits"), [(3, 10), (0, 1), (5, 0)])
def test_an_empty_split_is_refused(total, splits):
    with pytest.raises(UserError) as error:
        Marginals(total, splits)
    assert_sentence(str(error.value), [f"{total} samples", f"{splits} splits", "raise the number"])
