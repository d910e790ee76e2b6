"""The Inception score where its value is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.metrics.inception_score import inception_score
from shortcut_jax.metrics.summaries import Marginals


def score(logits, splits=1, batch=13):
    marginals = Marginals(len(logits), splits)
    for start in range(0, len(logits), batch):
        marginals.update(logits[start : start + batch])
    return inception_score(marginals)


@pytest.mark.parametrize("splits", [1, 10])
def test_images_that_say_nothing_have_score_one(splits):
    assert score(np.zeros((50, 7)), splits) == pytest.approx((1, 0), abs=1e-12)
    same = np.tile(np.random.default_rng(0).normal(size=7), (50, 1))
    assert score(same, splits) == pytest.approx((1, 0), abs=1e-12)


def test_sure_and_even_images_have_as_many_as_there_are_classes():
    assert score(800 * np.eye(12), 1) == pytest.approx((12, 0), rel=1e-12)
    assert score(np.tile(800 * np.eye(4), (10, 1)), 10) == pytest.approx((4, 0), rel=1e-12)


def test_splits_are_consecutive_and_the_deviation_divides_by_their_number():
    # Split 0: two classes. Split 1: one class, then the other half of three. Logits 800: sure.
    classes = np.array([0, 1, 0, 1, 2, 2, 2, 2, 0, 1, 2, 3])
    mean, std = score(800 * np.eye(4)[classes], 3)
    assert mean == pytest.approx((2 + 1 + 4) / 3, rel=1e-12)
    assert std == pytest.approx(np.std([2, 1, 4]), rel=1e-12)


def test_two_classes_of_given_probabilities():
    logits = np.log([[0.9, 0.1], [0.2, 0.8]])
    marginal = np.array([0.55, 0.45])
    divergence = np.sum(np.exp(logits) * (logits - np.log(marginal)), axis=1).mean()
    assert score(logits)[0] == pytest.approx(np.exp(divergence), rel=1e-13)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_between_one_and_the_classes_and_no_matter_in_which_order(n, classes, scale, seed):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, classes))
    found = score(logits)[0]
    assert 1 - 1e-12 <= found <= min(n, classes) + 1e-9
    assert score(rng.permutation(logits))[0] == pytest.approx(found, rel=1e-11)
    assert score(logits[:, ::-1])[0] == pytest.approx(found, rel=1e-11)
    assert score(logits + 5)[0] == pytest.approx(found, rel=1e-11)


def test_missing_samples_are_refused():
    marginals = Marginals(3, 1)
    marginals.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="only 2"):
        inception_score(marginals)
