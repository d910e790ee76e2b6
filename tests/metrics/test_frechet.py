"""The Fréchet distance against closed forms, and the running moments against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import Moments, Stats, frechet_distance


def moments(x, batch=None):
    result = Moments()
    for start in range(0, len(x), batch or len(x)):
        result.update(x[start : start + (batch or len(x))])
    return result


def random_spd(rng, d):
    root = rng.normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


def random_rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


# ---- moments -------------------------------------------------------------------------------------


def test_moments_match_numpy():
    x = np.random.default_rng(0).normal(size=(37, 5))
    m = moments(x, 10)
    assert m.n == 37
    np.testing.assert_allclose(m.mean, x.mean(axis=0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(m.cov, np.cov(x, rowvar=False), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch", [1, 7, 64, 999])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_do_not_depend_on_the_batches(batch, offset):
    x = offset + np.random.default_rng(1).normal(size=(1000, 6)) * np.arange(1, 7)
    whole, cut = moments(x), moments(x, batch)
    np.testing.assert_allclose(cut.mean, whole.mean, rtol=1e-12, atol=1e-12)
    scale = np.trace(whole.cov)
    np.testing.assert_allclose(cut.cov, whole.cov, rtol=0, atol=1e-12 * scale)


def test_a_large_mean_does_not_cancel_the_covariance():
    x = np.random.default_rng(2).integers(-3, 4, size=(500, 4)).astype(np.float64)
    # Integers: x + 2^30 is exact, so the covariance must come out as without the offset.
    np.testing.assert_allclose(moments(x + 2.0**30, 32).cov, moments(x).cov, rtol=0, atol=1e-12)


def test_float32_features_are_summed_in_float64():
    x = (1000 + np.random.default_rng(3).normal(size=(4096, 3))).astype(np.float32)
    m = moments(x, 64)
    assert m.mean.dtype == m.cov.dtype == np.float64
    np.testing.assert_allclose(m.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11)


def test_an_empty_batch_changes_nothing():
    x = np.random.default_rng(4).normal(size=(9, 2))
    m = Moments()
    m.update(np.zeros((0, 2)))
    m.update(x)
    m.update(np.zeros((0, 2)))
    assert m.n == 9
    np.testing.assert_array_equal(m.cov, moments(x).cov)


def test_update_leaves_the_caller_s_array_alone():
    x = np.random.default_rng(5).normal(size=(9, 2))
    before = x.copy()
    moments(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(bad):
    x = np.zeros((5, 3))
    x[3, 1] = bad
    with pytest.raises(UserError, match="1 of 5 samples"):
        moments(x)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_refused(n):
    few, enough = Moments(), moments(np.eye(2))
    few.update(np.ones((n, 2)))
    with pytest.raises(UserError, match=f"at least 2 samples, got {n}"):
        _ = few.cov
    with pytest.raises(UserError, match="at least 2 samples"):
        frechet_distance(enough, few)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)])
def test_a_batch_of_another_shape_is_refused(shape):
    m = moments(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"\[n, 3\]"):
        m.update(np.zeros(shape))


# ---- distance ------------------------------------------------------------------------------------


def test_equal_covariances_leave_the_distance_of_the_means():
    rng = np.random.default_rng(0)
    cov, mean = random_spd(rng, 6), rng.normal(size=6)
    shift = np.array([3.0, 0, -4.0, 0, 0, 0])
    assert frechet_distance(Stats(mean, cov), Stats(mean + shift, cov)) == pytest.approx(25.0)


def test_diagonal_covariances():
    a, b = np.array([1.0, 4.0, 9.0, 0.0]), np.array([16.0, 1.0, 9.0, 4.0])
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    zero = np.zeros(4)
    assert frechet_distance(Stats(zero, np.diag(a)), Stats(zero, np.diag(b))) == pytest.approx(
        expected, rel=1e-12
    )


def test_commuting_covariances():
    rng = np.random.default_rng(1)
    q = random_rotation(rng, 20)
    a, b = rng.uniform(0.1, 5, size=(2, 20))
    stats = [Stats(np.zeros(20), q @ np.diag(v) @ q.T) for v in (a, b)]
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(*stats) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 16, 64])
def test_random_covariances_match_the_matrix_square_root_of_scipy(d):
    from scipy import linalg

    rng = np.random.default_rng(d)
    (cov_a, cov_b), (mean_a, mean_b) = [random_spd(rng, d) for _ in "ab"], rng.normal(size=(2, d))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    distance = frechet_distance(Stats(mean_a, cov_a), Stats(mean_b, cov_b))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_sets_match_the_nuclear_norm_of_the_cross_products():
    """tr((C_a^(1/2) C_b C_a^(1/2))^(1/2)) is the nuclear norm of X_a X_b^T / (n - 1)."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 20, 64)) * np.linspace(0.1, 5, 64)
    y = 1.3 * y + 0.5
    xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
    nuclear = np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    traces = np.sum(xc**2) + np.sum(yc**2)
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + (traces - 2 * nuclear) / 19
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-10)


def test_a_singular_covariance_against_a_regular_one():
    rng = np.random.default_rng(4)
    q = random_rotation(rng, 40)
    a, b = rng.uniform(1, 5, size=(2, 40))
    b[10:] = 0
    full, singular = (Stats(np.zeros(40), q @ np.diag(v) @ q.T) for v in (a, b))
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(full, singular) == pytest.approx(expected, abs=1e-5)
    assert frechet_distance(singular, full) == pytest.approx(expected, abs=1e-5)


def test_a_tiny_but_real_variance_counts():
    a, b = np.diag([1.0, 1e-8]), np.diag([1.0, 1e4])
    expected = (1e-4 - 1e2) ** 2
    assert frechet_distance(Stats(np.zeros(2), a), Stats(np.zeros(2), b)) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("n", [5, 20, 500])
def test_a_set_against_itself_is_zero(n):
    x = 100 * np.random.default_rng(n).normal(size=(n, 64))
    assert abs(frechet_distance(moments(x), moments(x, 3))) < 1e-6


def test_a_set_without_any_spread_is_a_point():
    points, other = moments(np.ones((4, 3))), moments(np.diag([1.0, 2.0, 3.0]))
    expected = np.sum((1 - other.mean) ** 2) + np.trace(other.cov)
    assert frechet_distance(points, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, points) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(d=st.integers(1, 8), n=st.integers(2, 40), seed=st.integers(0, 2**32 - 1))
def test_symmetric_non_negative_and_unchanged_by_rotation(d, n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    q = random_rotation(rng, d)
    distance = frechet_distance(moments(x), moments(y))
    tolerance = 1e-6 * (1 + np.trace(moments(x).cov) + np.trace(moments(y).cov))
    assert distance > -tolerance
    assert abs(frechet_distance(moments(y), moments(x)) - distance) < tolerance
    assert abs(frechet_distance(moments(x @ q), moments(y @ q)) - distance) < tolerance
    # Gelbrich's lower bound: the distance is at least that of the means.
    assert distance >= np.sum((moments(x).mean - moments(y).mean) ** 2) - tolerance


def test_scaling_features_scales_the_distance_by_the_square():
    x, y = np.random.default_rng(7).normal(size=(2, 50, 8))
    assert frechet_distance(moments(10 * x), moments(10 * y)) == pytest.approx(
        100 * frechet_distance(moments(x), moments(y)), rel=1e-9
    )


def test_different_feature_dimensions_are_refused():
    with pytest.raises(UserError, match="2 and 3 features"):
        frechet_distance(moments(np.eye(2)), moments(np.eye(3)))


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (Stats(np.zeros(2), np.eye(3)), r"\(2,\).*\(3, 3\)"),
        (Stats(np.zeros(2), np.full((2, 2), np.nan)), "NaN"),
        (Stats(np.array([0, np.inf]), np.eye(2)), "NaN"),
    ],
)
def test_malformed_statistics_are_refused(stats, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(moments(np.eye(2)), stats)
