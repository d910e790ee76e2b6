"""scikit-learn's digits: 1,797 grey images of 8x8 pixels, for tests and first runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from shortcut_jax.data import sources

TEST_EVERY = 5


class Digits(sources.ArraysBuilder):
    """scikit-learn's digits, grey levels 0..16 scaled to 0..255, 80% train and 20% test."""

    VERSION = tfds.core.Version("1.0.0")
    IMAGE_SHAPE = (8, 8, 1)
    NUM_CLASSES = 10

    def read_arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
        held_out = select_test_rows(digits.target)
        return {
            "train": (images[~held_out], digits.target[~held_out]),
            "test": (images[held_out], digits.target[held_out]),
        }


def select_test_rows(labels: np.ndarray) -> np.ndarray:
    """Marks every fifth row of each class.

    Args:
      labels: int [n].

    Returns:
      bool [n].
    """
    selected = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        selected[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return selected


def open_split(section: Mapping[str, Any], data_dir: Path) -> sources.Dataset:
    """Opens digits, preparing it on first use.

    Raises:
      UserError: `data_dir` cannot be written.
    """
    builder = sources.prepare(Digits, data_dir)
    rows = sources.load_split(builder, section["split"])
    return sources.in_memory(section["name"], section["split"], rows, builder)
