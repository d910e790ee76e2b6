"""Metrics as they are computed from summaries: which set is which, and what a protocol adds."""

import numpy as np
import pytest

from shortcut_jax.metrics import values
from shortcut_jax.metrics.frechet import frechet_distance
from shortcut_jax.metrics.protocols import INCEPTION
from shortcut_jax.metrics.summaries import Moments, Rows


def filled(summary, values):
    summary.update(values)
    return summary


def test_the_offset_of_a_protocol_is_in_its_distances():
    numbers = np.random.default_rng(0)
    # Fewer samples than features: the roots of what is added to eigenvalues of 0 are seen.
    a, b = (filled(Moments(), numbers.normal(size=(4, 8))) for _ in range(2))
    found = {name: values.frechet(a, b, INCEPTION[name]).value for name in ("adm", "authors")}
    assert found == {"adm": frechet_distance(a, b), "authors": frechet_distance(a, b, 1e-6)}
    assert abs(found["authors"] - found["adm"]) > 1e-6


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    # Two clusters of images, of which the samples have one, and one sample that is like none.
    cluster = np.random.default_rng(0).uniform(size=(20, 2))
    reference = np.concatenate([cluster, cluster + 100])
    samples = np.concatenate([cluster, [[1e4, 1e4]]])
    samples, reference = (filled(Rows(len(a)), a) for a in (samples, reference))
    precision = values.precision(samples, reference, INCEPTION["adm"])
    recall = values.recall(samples, reference, INCEPTION["adm"])
    assert precision.value == pytest.approx(20 / 21)
    # The ball of the sample that is like none reaches to the others, over the second cluster.
    assert recall.value == 1
    assert precision.facts == recall.facts == {"k": 3, "sample_rows": 21, "reference_rows": 40}
