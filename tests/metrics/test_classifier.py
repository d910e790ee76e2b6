"""The shipped feature extractors: what they compute, and what they refuse."""

import hashlib
import importlib.resources
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from shortcut_jax.data import open_dataset
from shortcut_jax.data.fashion_mnist import IDX_DIR
from shortcut_jax.errors import UserError
from shortcut_jax.metrics import EXTRACTORS, Moments, frechet_distance
from shortcut_jax.metrics import classifier as lib

CLASSIFIERS = [name for name, spec in EXTRACTORS.items() if spec.module == lib.__name__]
WEIGHTS = Path(str(importlib.resources.files("shortcut_jax.metrics"))) / "weights"
INSTALL = "apt-get update && apt-get install -y dataset-fashion-mnist"


def stats(extractor, images):
    moments = Moments()
    moments.update(extractor.outputs(images)["features"])
    return moments


def accuracy(extractor, dataset):
    rows = dataset.rows(np.arange(dataset.size))
    return np.mean(np.argmax(extractor.outputs(rows["image"])["logits"], axis=1) == rows["label"])


def copy_weights(name, folder):
    for suffix in (".npz", ".json"):
        (folder / f"{name}{suffix}").write_bytes((WEIGHTS / f"{name}{suffix}").read_bytes())
    return folder


# ---- the shipped files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_weights_are_small_and_are_those_of_the_record(name):
    data = (WEIGHTS / f"{name}.npz").read_bytes()
    record = json.loads((WEIGHTS / f"{name}.json").read_text())
    extractor = lib.load_extractor(name)
    assert hashlib.sha256(data).hexdigest() == record["sha256"] == extractor.sha256
    assert extractor.info == record
    assert len(data) < 300_000


@pytest.mark.parametrize(
    ("name", "at_least", "held_out"), [("fd_digits", 0.98, True), ("fd_digits_mlp64", 0.99, False)]
)
def test_recorded_accuracy_on_digits_is_reproduced(name, at_least, held_out, digits):
    extractor = lib.load_extractor(name)
    test, training = extractor.info["test"], extractor.info["training"]
    assert test["fingerprint"] == digits[test["split"]].fingerprint
    assert training["fingerprint"] == digits[training["split"]].fingerprint
    assert test["held_out"] == held_out == (test["split"] != training["split"])
    # Half a row of room: the same images are right on every machine.
    slack = 0.5 / digits[test["split"]].size
    assert accuracy(extractor, digits[test["split"]]) == pytest.approx(test["accuracy"], abs=slack)
    assert test["accuracy"] >= at_least


@pytest.mark.skipif(not Path(IDX_DIR).is_dir(), reason=f"needs Fashion-MNIST: {INSTALL}")
def test_recorded_accuracy_on_fashion_mnist_is_reproduced(tmp_path):
    extractor = lib.load_extractor("fd_fashion_mnist")
    recorded = extractor.info["test"]
    dataset = open_dataset(dict(name="fashion_mnist", split="test", data_dir=str(tmp_path)))
    assert recorded["split"] == "test"
    assert recorded["fingerprint"] == dataset.fingerprint
    # Logits that tie within rounding may fall either way on another machine.
    assert accuracy(extractor, dataset) == pytest.approx(recorded["accuracy"], abs=3e-4)
    assert recorded["accuracy"] >= 0.9


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, lib.BATCH, lib.BATCH + 1])
def test_features_have_one_row_per_image(n, fd_digits, digit_images):
    features = fd_digits.outputs(digit_images[:n])["features"]
    assert features.shape == (n, fd_digits.feature_dim) == (n, 64)
    assert features.dtype == np.float32
    assert (features >= 0).all()


@pytest.mark.parametrize("name", ["fd_digits", "fd_digits_mlp64"])
def test_features_do_not_depend_on_the_batch(name, digit_images):
    extractor = lib.load_extractor(name)
    images = digit_images[: 2 * lib.BATCH + 50]
    whole = extractor.outputs(images)["features"]
    parts = [extractor.outputs(images[i : i + 37])["features"] for i in range(0, len(images), 37)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_allclose(
        extractor.outputs(images[::-1])["features"][::-1], whole, rtol=0, atol=1e-5
    )


def test_mlp64_features_are_the_hidden_layer(fd_digits_mlp64, digit_images):
    with np.load(WEIGHTS / "fd_digits_mlp64.npz") as arrays:
        weights = {key: arrays[key].astype(np.float64) for key in arrays.files}
    x = digit_images.reshape(-1, 64) / 127.5 - 1
    hidden = np.maximum(x @ weights["hidden/kernel"] + weights["hidden/bias"], 0)
    logits = hidden @ weights["output/kernel"] + weights["output/bias"]
    np.testing.assert_allclose(fd_digits_mlp64.outputs(digit_images)["features"], hidden, atol=1e-5)
    np.testing.assert_allclose(fd_digits_mlp64.outputs(digit_images)["logits"], logits, atol=1e-4)


def test_mlp64_is_scikit_learn_s_classifier(fd_digits_mlp64):
    """Same predictions from uint8 as scikit-learn makes from its own grey levels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    np.testing.assert_array_equal(fd_digits_mlp64.outputs(images)["logits"].argmax(axis=1), labels)


@pytest.mark.parametrize(
    "architecture", [{"network": "cnn", "strides": [1, 2, 1]}, {"network": "mlp"}]
)
def test_every_product_has_the_highest_precision(architecture):
    """TPUs (bfloat16) and recent GPUs (TF32) compute products in less than float32 by default."""
    network = lib.make_network({**architecture, "num_classes": 10})
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), np.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)
    text = jax.jit(network.apply).lower(params, images).as_text()
    products = [
        line for line in text.splitlines() if "dot_general" in line or "convolution" in line
    ]
    assert len(products) == len(params["params"])
    for line in products:
        assert line.count("HIGHEST") == 2, line


# ---- distances -----------------------------------------------------------------------------------


# The numbers are in README.md.
@pytest.mark.parametrize(("name", "apart"), [("fd_digits", 4.85), ("fd_digits_mlp64", 0.574)])
def test_distances_are_zero_small_and_large_where_they_should_be(name, apart, digit_images):
    extractor = lib.load_extractor(name)
    rng = np.random.default_rng(0)
    images = digit_images[rng.permutation(len(digit_images))]
    noise = rng.integers(0, 256, images.shape).astype(np.uint8)
    everything, first, second, noise = (
        stats(extractor, x) for x in (images, images[::2], images[1::2], noise)
    )
    assert abs(frechet_distance(everything, everything)) < 1e-6
    halves = frechet_distance(first, second)
    assert halves == pytest.approx(apart, rel=0.01)
    assert halves < 0.01 * np.trace(everything.cov)
    assert frechet_distance(everything, noise) > 30 * halves


def test_blur_is_a_distance_that_grows(fd_digits, digit_images):
    reference = stats(fd_digits, digit_images)
    distances = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        smooth = np.roll(digit_images, 1, axis=2) / 2 + np.roll(digit_images, -1, axis=2) / 2
        mixed = (1 - strength) * digit_images + strength * smooth
        distances.append(frechet_distance(reference, stats(fd_digits, mixed.astype(np.uint8))))
    assert distances == sorted(distances)
    assert distances[1] > 1e-3


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
    ],
)
def test_other_images_are_refused(images, fd_digits):
    with pytest.raises(
        UserError, match=r"fd_digits.*\(n, 8, 8, 1\).*" + re.escape(str(images.shape))
    ):
        fd_digits.outputs(images)


def test_whole_numbers_that_are_no_grey_levels_are_refused(fd_digits):
    with pytest.raises(UserError, match="dtype int32"):
        fd_digits.outputs(np.zeros((2, 8, 8, 1), np.int32))


def test_samples_are_rounded_to_grey_levels(fd_digits):
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    samples = levels / 127.5 - 1 + np.random.default_rng(0).uniform(-0.003, 0.003, levels.shape)
    samples = samples.astype(np.float32)
    expected = fd_digits.outputs(levels)["features"]
    np.testing.assert_array_equal(fd_digits.outputs(samples)["features"], expected)
    samples[2, 0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 4 images .* NaN"):
        fd_digits.outputs(samples)


def test_corrupted_weights_are_refused(tmp_path):
    folder = copy_weights("fd_digits", tmp_path)
    lib.load_extractor("fd_digits", directory=folder)
    data = bytearray((folder / "fd_digits.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "fd_digits.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"fd_digits\.npz has sha256 [0-9a-f]{64}, expected"):
        lib.load_extractor("fd_digits", directory=folder)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_a_missing_file_is_named(suffix, tmp_path):
    folder = copy_weights("fd_digits", tmp_path)
    (folder / f"fd_digits{suffix}").unlink()
    with pytest.raises(UserError, match=rf"fd_digits\{suffix} does not exist.*--name=fd_digits"):
        lib.load_extractor("fd_digits", directory=folder)
