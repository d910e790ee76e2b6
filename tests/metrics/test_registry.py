"""Metrics by name."""

import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import METRICS, check_metric, load_extractor


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"fid"}))
def test_registry_agrees_with_the_extractors(name):
    extractor = load_extractor(name)
    assert extractor.name == name
    check_metric(name, extractor.image_shape)


def test_only_inception_features_are_called_fid():
    called = {name for name in METRICS if "fid" in name.lower()}
    assert called == {n for n, spec in METRICS.items() if spec.module == "shortcut_jax.metrics.fid"}


@pytest.mark.parametrize("function", [load_extractor, lambda name: check_metric(name, (8, 8, 1))])
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
