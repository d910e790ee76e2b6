"""Fixtures of the data tests."""

from pathlib import Path

import numpy as np
import pytest

from shortcut_jax.data import open_dataset
from shortcut_jax.data.sources import Dataset


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in which digits is prepared."""
    data_dir = tmp_path_factory.mktemp("tfds")
    open_dataset(dict(name="digits", split="train", data_dir=str(data_dir)))
    return data_dir


@pytest.fixture
def make_toy():
    """Makes a data set of `size` rows: label i and no two pixels of a row alike."""

    def make(size: int) -> Dataset:
        images = (np.arange(size)[:, None] * 7 + np.arange(6)).astype(np.uint8)
        images = images.reshape(size, 2, 3, 1)
        labels = np.arange(size, dtype=np.int32)
        return Dataset(
            name="toy",
            split="train",
            image_shape=(2, 3, 1),
            num_classes=size,
            size=size,
            fingerprint="",
            read=lambda indices: {"image": images[indices], "label": labels[indices]},
        )

    return make
