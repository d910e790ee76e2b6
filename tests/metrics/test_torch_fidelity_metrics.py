"""FID, KID, Inception score, precision and recall are torch-fidelity's on the same features."""

import json

import pytest

from shortcut_jax.metrics import frechet_distance
from shortcut_jax.metrics.inception_score import inception_score
from shortcut_jax.metrics.kid import kid
from shortcut_jax.metrics.precision_recall import precision, recall
from shortcut_jax.metrics.summaries import Marginals, Moments, Rows
from tests.golden import make_torch_fidelity_metrics as golden

EXPECTED = json.loads(golden.FILE.read_text())["found"]


@pytest.fixture(scope="module", params=list(golden.SETS))
def case(request):
    """Name, samples and reference image features, what torch-fidelity found of them."""
    name = request.param
    sets = [golden.features(name, which) for which in ("samples", "reference")]
    return name, *sets, EXPECTED[name]


def filled(summary, values, batch=100):
    for start in range(0, len(values), batch):
        summary.update(values[start : start + batch])
    return summary


def rows(values):
    return filled(Rows(len(values)), values)


def test_frechet_distance(case):
    _, samples, reference, expected = case
    found = frechet_distance(filled(Moments(), samples), filled(Moments(), reference))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


def test_kid(case):
    name, samples, reference, expected = case
    mean, std = kid(rows(samples), rows(reference), *golden.SUBSETS[name])
    # The same subsets: what is left is rounding. Their sums are of float32 for float32 features.
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert mean == pytest.approx(expected["float32/kernel_inception_distance_mean"], abs=1e-5)
    assert std == pytest.approx(expected["float32/kernel_inception_distance_std"], abs=1e-5)
    other_draws, _ = kid(rows(samples), rows(reference), *golden.SUBSETS[name], seed=1)
    whole = all(golden.SUBSETS[name][1] == len(x) for x in (samples, reference))
    assert whole or abs(other_draws / mean - 1) > 1e-4  # the comparison sees which are drawn


@pytest.mark.parametrize("k", golden.NEIGHBOURS)
def test_precision_and_recall(case, k):
    _, samples, reference, expected = case
    count, of = len(samples), len(reference)
    # Counts: theirs are shares in float32.
    assert precision(rows(samples), rows(reference), k) * count == pytest.approx(
        round(expected[f"{k}/precision"] * count), abs=1e-6
    )
    assert recall(rows(samples), rows(reference), k) * of == pytest.approx(
        round(expected[f"{k}/recall"] * of), abs=1e-6
    )


@pytest.mark.parametrize("name", list(golden.LOGITS))
def test_inception_score(name):
    values, splits = golden.logits(name), golden.LOGITS[name][2]
    mean, std = inception_score(filled(Marginals(len(values), splits), values))
    expected = EXPECTED[f"logits/{name}"]
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)
