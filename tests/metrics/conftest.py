"""Fixtures of the metric tests."""

import numpy as np
import pytest

from shortcut_jax.data import open_dataset
from shortcut_jax.metrics.classifier import load_extractor


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Split -> the opened digits data set, prepared once."""
    data_dir = str(tmp_path_factory.mktemp("metrics_data"))
    splits = ("train", "test", "train+test")
    return {
        split: open_dataset(dict(name="digits", split=split, data_dir=data_dir)) for split in splits
    }


@pytest.fixture(scope="session")
def digit_images(digits):
    """uint8 [1797, 8, 8, 1]."""
    return digits["train+test"].rows(np.arange(digits["train+test"].size))["image"]


@pytest.fixture(scope="session")
def fd_digits():
    return load_extractor("fd_digits")


@pytest.fixture(scope="session")
def fd_digits_mlp64():
    return load_extractor("fd_digits_mlp64")
