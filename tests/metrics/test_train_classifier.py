"""The script that makes the shipped weights, on a handful of images."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from shortcut_jax.data.sources import Dataset
from shortcut_jax.metrics import EXTRACTORS, classifier
from shortcut_jax.metrics import train_classifier as lib

CLASSIFIERS = [name for name, spec in EXTRACTORS.items() if spec.module == classifier.__name__]


def make_stripes(split: str) -> Dataset:
    """8x8 images of a bright row (label 0) or column (label 1) on noise.

    A quarter of the split "test" is mislabelled, so that its accuracy is not that of "train".
    """
    rng = np.random.default_rng(len(split))
    n = 2 * lib.BATCH
    labels = (np.arange(n) % 2).astype(np.int32)
    images = rng.integers(0, 100, (n, 8, 8, 1)).astype(np.uint8)
    for image, label, place in zip(images, labels, rng.integers(1, 7, n), strict=True):
        (image.swapaxes(0, 1) if label else image)[place] = 250
    if split == "test":
        labels[: n // 4] = 1 - labels[: n // 4]
    return Dataset(
        name="stripes",
        split=split,
        image_shape=(8, 8, 1),
        num_classes=2,
        size=n,
        fingerprint=f"print-{split}",
        read=lambda indices: {"image": images[indices], "label": labels[indices]},
    )


@pytest.fixture
def stripes(monkeypatch):
    """The recipe "stripes", a minute version of that of fd_digits."""
    recipe = dataclasses.replace(
        lib.RECIPES["fd_digits"],
        architecture={"network": "cnn", "num_classes": 2, "strides": [1, 2, 1]},
        fit=functools.partial(lib.fit_cnn, epochs=12),
    )
    monkeypatch.setitem(lib.RECIPES, "stripes", recipe)
    monkeypatch.setattr(lib, "open_dataset", lambda section: make_stripes(section["split"]))


def test_there_is_a_recipe_for_every_metric():
    assert set(lib.RECIPES) == set(CLASSIFIERS)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_records_are_those_of_the_recipes(name):
    recipe, info = lib.RECIPES[name], classifier.load_extractor(name).info
    assert info["architecture"] == recipe.architecture
    assert info["training"]["dataset"] == recipe.dataset
    assert info["training"]["split"] == recipe.train_split
    assert info["test"]["split"] == recipe.test_split
    assert f"--name={name} --seed={info['training']['seed']}" in info["command"]
    if isinstance(recipe.fit, functools.partial):
        assert info["training"]["epochs"] == recipe.fit.keywords["epochs"]


def test_training_learns_and_writes_a_loadable_extractor(stripes, tmp_path):
    record = lib.train("stripes", tmp_path / "new", seed=3)
    assert record == json.loads((tmp_path / "new" / "stripes.json").read_text())
    extractor = classifier.load_extractor("stripes", directory=tmp_path / "new")
    assert extractor.info == record
    assert record["training"]["fingerprint"] == "print-train"
    assert record["test"]["fingerprint"] == "print-test"
    assert record["test"]["accuracy"] == lib.measure_accuracy(extractor, make_stripes("test"))
    assert record["test"]["accuracy"] == pytest.approx(0.75, abs=0.05)


def test_the_seed_decides_every_byte(stripes, tmp_path):
    first, again, other = (
        lib.train("stripes", tmp_path / str(i), seed=seed)["sha256"]
        for i, seed in enumerate([0, 0, 1])
    )
    assert first == again != other
    data = [(tmp_path / str(i) / "stripes.npz").read_bytes() for i in range(2)]
    assert data[0] == data[1]


def test_accuracy_counts_right_answers():
    dataset = make_stripes("test")

    class Constant:
        def outputs(self, images):
            return {"logits": np.tile([1.0, 0.0], (len(images), 1))}

    assert lib.measure_accuracy(Constant(), dataset) == 0.5


def test_shifts_move_images_and_leave_black_behind():
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    shifts = lib.all_shifts(image)
    assert shifts.shape == (1, 3, 3, 3, 3, 1)
    np.testing.assert_array_equal(shifts[0, 1, 1], image[0])
    assert shifts[0, 0, 1, ..., 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shifts[0, 1, 2, ..., 0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]


def test_the_command_writes_mlp64_of_scikit_learn(run_python, tmp_path):
    """Close to the shipped weights; equal bytes only with the same versions and machine."""
    flags = ["--name=fd_digits_mlp64", f"--data_dir={tmp_path}", f"--output={tmp_path / 'out'}"]
    done = run_python(["-m", "shortcut_jax.metrics.train_classifier", *flags])
    assert done.returncode == 0
    made = classifier.load_extractor("fd_digits_mlp64", directory=tmp_path / "out")
    shipped = classifier.load_extractor("fd_digits_mlp64")
    assert made.info["test"] == shipped.info["test"]
    assert made.info["training"]["split"] == "train+test"
    assert made.info["test"]["held_out"] is False


def test_the_command_reports_what_the_user_can_fix(run_python):
    flags = ["--name=fd_digits", "--data_dir=gs://bucket"]
    done = run_python(["-m", "shortcut_jax.metrics.train_classifier", *flags])
    assert done.returncode == 2
    assert "gs://bucket" in done.stderr and "Traceback" not in done.stderr
