"""digits holds what scikit-learn ships, split by class."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from shortcut_jax.data import open_dataset
from shortcut_jax.data.digits import select_test_rows


@pytest.fixture
def splits(digits_dir):
    return {
        split: open_dataset(dict(name="digits", split=split, data_dir=str(digits_dir)))
        for split in ("train", "test", "train+test")
    }


def rows_of(dataset):
    return dataset.rows(np.arange(dataset.size))


def test_content_is_scikit_learns(splits):
    digits = load_digits()
    held_out = select_test_rows(digits.target)
    order = np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)])
    rows = rows_of(splits["train+test"])
    np.testing.assert_array_equal(rows["label"], digits.target[order])
    greys = rows["image"][..., 0].astype(float)
    assert greys.min() == 0 and greys.max() == 255
    np.testing.assert_array_equal(np.round(greys * 16 / 255), digits.images[order])
    assert np.abs(greys - digits.images[order] * 255 / 16).max() <= 0.5
    assert rows["image"].shape == (1797, 8, 8, 1)
    assert rows["image"].dtype == np.uint8 and rows["label"].dtype == np.int32


def test_splits_are_disjoint_and_whole(splits):
    train, test, both = (rows_of(splits[split]) for split in ("train", "test", "train+test"))
    for key in ("image", "label"):
        np.testing.assert_array_equal(np.concatenate([train[key], test[key]]), both[key])
    images = [{image.tobytes() for image in rows["image"]} for rows in (train, test)]
    assert not images[0] & images[1]  # No image of scikit-learn's digits occurs twice.


def test_every_class_is_split_alike(splits):
    train, test = (np.bincount(rows_of(splits[split])["label"]) for split in ("train", "test"))
    assert len(train) == len(test) == 10
    np.testing.assert_array_equal(test, (train + test) // 5)


def test_reopening_gives_the_same_fingerprint(splits, tmp_path):
    again = open_dataset(dict(name="digits", split="train+test", data_dir=str(tmp_path)))
    # The value itself, since checkpoints remember it.
    assert again.fingerprint == splits["train+test"].fingerprint == "725116d5af2f8b52"
    assert len({dataset.fingerprint for dataset in splits.values()}) == 3
