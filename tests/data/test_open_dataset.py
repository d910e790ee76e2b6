"""Opening by name: what is checked before anything is read or written."""

import pytest

from shortcut_jax.data import DATASETS, check_split, describe, open_dataset
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence

IMAGES = {"builder": "a", "image_size": 16, "crop": "adm", "num_classes": 3, "workers": 0}


def test_describe_agrees_with_the_opened_data_set(digits_dir):
    dataset = open_dataset(dict(name="digits", split="train", data_dir=str(digits_dir)))
    assert (
        describe({"name": "digits"})
        == (dataset.image_shape, dataset.num_classes)
        == ((8, 8, 1), 10)
    )
    assert describe({"name": "fashion_mnist"}) == ((32, 32, 1), 10)
    assert describe({"name": "images", **IMAGES}) == ((16, 16, 3), 3)


@pytest.mark.parametrize("key", IMAGES)
def test_images_needs_each_of_its_keys(key):
    with pytest.raises(UserError) as error:
        describe({"name": "images", **{k: v for k, v in IMAGES.items() if k != key}})
    assert_sentence(str(error.value), ("data.name=images", f"has no data.{key}", "expected"))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("key", IMAGES)
def test_others_refuse_the_keys_of_images(name, key):
    with pytest.raises(UserError) as error:
        describe({"name": name, "split": "train", key: IMAGES[key]})
    assert_sentence(str(error.value), (f"data.name={name}", f"has data.{key}", "expected"))


def test_describe_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    for name in DATASETS:
        section = {"name": name, "split": "train+test", "data_dir": "", "flip": False}
        section |= IMAGES if name == "images" else {}
        describe(section)
        check_split(section)
    assert not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
    section = dict(name="didgits", split="train", data_dir=str(tmp_path))
    for call in (describe, check_split, open_dataset):
        with pytest.raises(UserError, match="'didgits'.*digits, fashion_mnist, images"):
            call(section)


@pytest.mark.parametrize("split", ["trian", "", "train+", "train+train", "train[:10%]"])
def test_unknown_split(tmp_path, split):
    with pytest.raises(UserError, match="split=.*train, test"):
        open_dataset(dict(name="digits", split=split, data_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_default_data_dir_is_tfds_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    open_dataset(dict(name="digits", split="test"))
    assert (tmp_path / "environment" / "digits" / "1.0.0").is_dir()
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_dataset(dict(name="digits", split="test"))
    assert (tmp_path / "home" / "tensorflow_datasets" / "digits" / "1.0.0").is_dir()


def test_remote_data_dir():
    with pytest.raises(UserError, match="gs://bucket/data .*local folder"):
        open_dataset(dict(name="digits", split="test", data_dir="gs://bucket/data"))
