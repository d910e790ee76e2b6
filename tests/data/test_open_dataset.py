"""Opening by name: what is checked before anything is read or written."""

import pytest

from shortcut_jax.data import DATASETS, check_split, describe, open_dataset
from shortcut_jax.errors import UserError


def test_describe_agrees_with_the_opened_data_set(digits_dir):
    dataset = open_dataset("digits", split="train", data_dir=str(digits_dir))
    assert describe("digits") == (dataset.image_shape, dataset.num_classes) == ((8, 8, 1), 10)
    assert describe("fashion_mnist") == ((32, 32, 1), 10)


def test_describe_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    for name in DATASETS:
        describe(name)
        check_split(name, "train+test")
    assert not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
    for call in (describe, lambda name: open_dataset(name, split="train", data_dir=str(tmp_path))):
        with pytest.raises(UserError, match="'didgits'.*digits, fashion_mnist"):
            call("didgits")


@pytest.mark.parametrize("split", ["trian", "", "train+", "train+train", "train[:10%]"])
def test_unknown_split(tmp_path, split):
    with pytest.raises(UserError, match="split=.*train, test"):
        open_dataset("digits", split=split, data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_default_data_dir_is_tfds_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    open_dataset("digits", split="test")
    assert (tmp_path / "environment" / "digits" / "1.0.0").is_dir()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_dataset("digits", split="test")
    assert (tmp_path / "home" / "tensorflow_datasets" / "digits" / "1.0.0").is_dir()


def test_remote_data_dir():
    with pytest.raises(UserError, match="gs://bucket/data .*local folder"):
        open_dataset("digits", split="test", data_dir="gs://bucket/data")
