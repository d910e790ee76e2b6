"""Metrics by name."""

import importlib
import types

import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import (
    EXTRACTORS,
    METRICS,
    check_metric,
    find,
    higher_is_better,
    label,
    load_extractor,
)
from shortcut_jax.metrics.gauges import CLASSES, SUMMARIES

SMALL = [name for name, spec in EXTRACTORS.items() if spec.module.endswith("classifier")]


@pytest.mark.parametrize("name", SMALL)
def test_registry_agrees_with_the_extractors(name):
    (protocol,) = EXTRACTORS[name].protocols.values()
    extractor = load_extractor(name, protocol, {})
    assert (extractor.name, extractor.weights, extractor.protocol) == (name, "", protocol)
    check_metric(name, extractor.image_shape)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_names_what_there_is(name):
    spec = METRICS[name]
    assert EXTRACTORS[spec.extractor].protocols
    assert spec.summary in SUMMARIES and CLASSES.keys() == SUMMARIES.keys()
    assert callable(importlib.import_module(EXTRACTORS[spec.extractor].module).load_extractor)


def test_protocols_are_known_by_their_names():
    for spec in EXTRACTORS.values():
        assert all(name == protocol.name for name, protocol in spec.protocols.items())


def test_only_inception_features_are_called_fid():
    called = {name for name in METRICS if "fid" in name.lower()}
    assert called == {"fid", "sfid"}
    assert all(
        METRICS[name].extractor == "inception" and METRICS[name].other_name for name in called
    )


@pytest.mark.parametrize("weights", ["", "random", "1a2b3c4d"])
@pytest.mark.parametrize("name", METRICS)
def test_the_direction_of_a_metric_is_known_by_what_its_numbers_are_called(name, weights):
    extractor = types.SimpleNamespace(name=METRICS[name].extractor, weights=weights)
    for num_samples in (50_000, 1797):
        called = label(name, extractor, num_samples)
        for written in (called, f"{called} (pytorch_fid)"):
            assert higher_is_better(written) == (name in ("is", "precision", "recall"))


@pytest.mark.parametrize("called", ["issue", "issue_50", "precisions (adm)"])
def test_what_is_called_otherwise_has_no_direction(called):
    with pytest.raises(UserError, match=called.split()[0]):
        higher_is_better(called)


@pytest.mark.parametrize("function", [find, lambda name: check_metric(name, (8, 8, 1))])
def test_an_unknown_metric_is_refused(function):
    with pytest.raises(UserError, match=r"'fid50k'.*fd_digits, fd_digits_mlp64"):
        function("fid50k")


def test_a_metric_for_other_images_is_refused():
    with pytest.raises(UserError, match=r"fd_digits .*\(8, 8, 1\).*\(32, 32, 1\)"):
        check_metric("fd_digits", (32, 32, 1))


def test_names_and_distances_come_without_jax(run_python):
    code = (
        "import sys, shortcut_jax.metrics as m; m.check_metric('fd_digits', (8, 8, 1)); "
        "m.frechet_distance; print(sorted({'jax', 'flax'} & set(sys.modules)))"
    )
    done = run_python(["-c", code])
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
