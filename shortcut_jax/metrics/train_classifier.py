"""Trains the feature extractors that this package ships, and writes their record.

    python -m shortcut_jax.metrics.train_classifier --name=fd_digits --output=weights

A run with the same seed, versions and kind of machine gives the same bytes. Numbers measured with
other weights cannot be compared, so replacing shipped weights starts a new metric.
"""

import dataclasses
import functools
import io
import json
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from shortcut_jax.cli import fail
from shortcut_jax.data import open_dataset
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.metrics.classifier import (
    FEATURE_DIM,
    Extractor,
    build_extractor,
    make_network,
    scale_pixels,
)

Params = dict[str, Any]
# (network, training rows, seed) -> parameters, and what to record of the training.
Fit = Callable[[nn.Module, Dataset, int], tuple[Params, dict[str, Any]]]

BATCH = 128
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-4
MAX_SHIFT = 1
MLP_MAX_ITER = 300


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one extractor is made.

    Attributes:
        dataset: name of the data set.
        train_split: what it is trained on.
        test_split: what its recorded accuracy is measured on.
        architecture: see `classifier.make_network`.
        fit: trains it.
    """

    dataset: str
    train_split: str
    test_split: str
    architecture: dict[str, Any]
    fit: Fit


def fit_cnn(
    network: nn.Module, dataset: Dataset, seed: int, *, epochs: int
) -> tuple[Params, dict[str, Any]]:
    """AdamW with linear warm-up and cosine decay, on images shifted by up to a pixel each way."""
    rows = dataset.rows(np.arange(dataset.size))
    windows = all_shifts(rows["image"])
    steps_per_epoch = dataset.size // BATCH
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(params, images, labels):
        _, logits = network.apply({"params": params}, scale_pixels(images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train_step(params, opt_state, images, labels):
        value, gradient = jax.value_and_grad(loss)(params, images, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    sample = scale_pixels(rows["image"][:1])
    params = network.init(jax.random.key(seed), sample)["params"]
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(dataset.size)[: steps_per_epoch * BATCH]
        for batch in order.reshape(-1, BATCH):
            down, right = rng.integers(2 * MAX_SHIFT + 1, size=(2, BATCH))
            params, opt_state, value = train_step(
                params, opt_state, windows[batch, down, right], rows["label"][batch]
            )
        logging.info("epoch %d of %d, last loss %.4f", epoch + 1, epochs, value)
    training = {
        "optimizer": "adamw, linear warm-up over 10% of the steps, cosine decay to 0",
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "batch_size": BATCH,
        "augmentation": f"shift by up to {MAX_SHIFT} pixel",
        "epochs": epochs,
    }
    return params, training


def fit_mlp64(network: nn.Module, dataset: Dataset, seed: int) -> tuple[Params, dict[str, Any]]:
    """scikit-learn's MLPClassifier on all digits, in scikit-learn's own order and grey levels.

    The features in which the authors' code was measured on this data set. They depend on the order
    of the rows, so `dataset`, which holds the same images by split, is not what is trained on.
    """
    del network, dataset
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    pixels, labels = load_digits(return_X_y=True)
    model = MLPClassifier((FEATURE_DIM,), random_state=seed, max_iter=MLP_MAX_ITER)
    model.fit(pixels / 8 - 1, labels)
    params = {
        layer: {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
        for layer, kernel, bias in zip(
            ("hidden", "output"), model.coefs_, model.intercepts_, strict=True
        )
    }
    training = {
        "optimizer": f"sklearn MLPClassifier(({FEATURE_DIM},), max_iter={MLP_MAX_ITER})",
        "epochs": model.n_iter_,
    }
    return params, training


RECIPES = {
    "fd_digits": Recipe(
        dataset="digits",
        train_split="train",
        test_split="test",
        architecture={"network": "cnn", "num_classes": 10, "strides": [1, 2, 1]},
        fit=functools.partial(fit_cnn, epochs=60),
    ),
    "fd_digits_mlp64": Recipe(
        dataset="digits",
        train_split="train+test",
        test_split="train+test",
        architecture={"network": "mlp", "num_classes": 10},
        fit=fit_mlp64,
    ),
    "fd_fashion_mnist": Recipe(
        dataset="fashion_mnist",
        train_split="train",
        test_split="test",
        architecture={"network": "cnn", "num_classes": 10, "strides": [2, 2, 1]},
        fit=functools.partial(fit_cnn, epochs=10),
    ),
}


def train(name: str, output: Path, data_dir: str = "", seed: int = 0) -> dict[str, Any]:
    """Trains an extractor and writes `<name>.npz` and `<name>.json` to `output`.

    Args:
        name: key of RECIPES.
        output: folder, created if needed.
        data_dir: as for `open_dataset`.
        seed: of the initial parameters and the order of the rows.

    Returns:
        The record that was written.

    Raises:
        UserError: the data set cannot be opened.
    """
    recipe = RECIPES[name]
    dataset, test_set = (
        open_dataset({"name": recipe.dataset, "split": split, "data_dir": data_dir})
        for split in (recipe.train_split, recipe.test_split)
    )
    params, training = recipe.fit(make_network(recipe.architecture), dataset, seed)

    weights = _npz_bytes(params)
    identity = {
        "name": name,
        "command": f"python -m shortcut_jax.metrics.train_classifier --name={name} --seed={seed}",
        "image_shape": list(dataset.image_shape),
        "feature_dim": FEATURE_DIM,
        "architecture": recipe.architecture,
    }
    extractor = build_extractor(identity, weights)
    record = {
        **identity,
        "training": {
            "dataset": recipe.dataset,
            "split": recipe.train_split,
            "fingerprint": dataset.fingerprint,
            "seed": seed,
            **training,
        },
        "test": {
            "split": recipe.test_split,
            "fingerprint": test_set.fingerprint,
            "held_out": recipe.test_split != recipe.train_split,
            "accuracy": measure_accuracy(extractor, test_set),
        },
        "versions": _versions(),
        "sha256": extractor.sha256,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.npz").write_bytes(weights)
    (output / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def measure_accuracy(extractor: Extractor, dataset: Dataset) -> float:
    """Fraction of the rows of a data set that the classifier labels correctly."""
    rows = dataset.rows(np.arange(dataset.size))
    return float(
        np.mean(extractor.outputs(rows["image"])["logits"].argmax(axis=-1) == rows["label"])
    )


def all_shifts(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W, C] -> view [n, s, s, H, W, C] of all shifts, s = 2 MAX_SHIFT + 1, black outside."""
    margin = (MAX_SHIFT, MAX_SHIFT)
    padded = np.pad(images, ((0, 0), margin, margin, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    return np.moveaxis(windows, 3, -1)


def _npz_bytes(params: Params) -> bytes:
    arrays: dict[str, Any] = flatten_dict(params, sep="/")
    buffer = io.BytesIO()
    # Not compressed: what deflate makes of the same numbers depends on the version of zlib.
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "optax", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "backend": jax.default_backend(),
    }


def _run() -> None:
    # Not at import: flags are global, and these names would clash with those of other programs.
    name = flags.DEFINE_enum("name", None, sorted(RECIPES), "Extractor to train.", required=True)
    data_dir = flags.DEFINE_string("data_dir", "", "Folder of prepared data.")
    output = flags.DEFINE_string("output", "weights", "Folder that gets the npz and the json.")
    seed = flags.DEFINE_integer("seed", 0, "Seed of the training.")

    def main(_: Sequence[str]) -> None:
        logging.set_verbosity(logging.INFO)
        try:
            record = train(name.value, Path(output.value), data_dir.value, seed.value)
        except UserError as error:
            fail(str(error))
        logging.info(
            "wrote %s and .json to %s: accuracy %.4f on %s",
            f"{name.value}.npz",
            output.value,
            record["test"]["accuracy"],
            record["test"]["split"],
        )

    app.run(main)


if __name__ == "__main__":
    _run()
