"""Image sets on disk: what is read, and what is refused with which sentence."""

import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from shortcut_jax.data import crops, images, open_dataset
from shortcut_jax.errors import UserError
from tests.data.photographs import cut, encoded, make_tfds
from tests.sentences import assert_sentence

CLASSES = ["n01440764", "n01443537", "n15075141"]
TRAIN, VALIDATION, TEST = range(7), range(10, 14), range(20, 22)
F = tfds.features


def record(seed: int, label: int | None = None) -> dict:
    data = encoded(seed)
    name = f"{CLASSES[seed % 3]}_{seed}.JPEG"
    return {"image": data, "label": seed % 3 if label is None else label, "file_name": name}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Sets with the features of imagenet2012 (two versions), celeb_a_hq and lsun."""
    data_dir = tmp_path_factory.mktemp("images")
    imagenet = {
        "image": F.Image(encoding_format="jpeg"),
        "label": F.ClassLabel(names=CLASSES),
        "file_name": F.Text(),
    }
    splits = {
        "train": [record(seed) for seed in TRAIN],
        "validation": [record(seed) for seed in VALIDATION],
        "test": [record(seed, label=-1) for seed in TEST],
    }
    make_tfds(data_dir, "like_imagenet", "9.0.0", imagenet, {"train": splits["validation"]})
    make_tfds(data_dir, "like_imagenet", "10.0.0", imagenet, splits)
    faces = {"image": F.Image(shape=(None, None, 3)), "image/filename": F.Text()}
    rows = [{"image": encoded(seed), "image/filename": f"{seed}.png"} for seed in TRAIN]
    made = make_tfds(data_dir, "like_celeb", "2.0.0", faces, {"train": rows})
    (data_dir / "like_celeb_a_hq" / "256").mkdir(parents=True)
    made.rename(data_dir / "like_celeb_a_hq" / "256" / "2.0.0")
    made.parent.rmdir()
    return data_dir


def section(data_dir: Path, **changes) -> dict:
    return {
        "name": "images", "split": "train", "data_dir": str(data_dir), "builder": "like_imagenet",
        "image_size": 16, "crop": "adm", "num_classes": 3, "workers": 0, **changes,
    }  # fmt: skip


def expected(seeds, crop=crops.adm, size=16) -> np.ndarray:
    return np.stack([crop(Image.fromarray(cut(seed)), size) for seed in seeds])


def refused(data_dir: Path, *fragments: str, **changes) -> None:
    with pytest.raises(UserError) as error:
        open_dataset(section(data_dir, **changes))
    assert_sentence(str(error.value), (*fragments, "expected"))


def test_images_and_labels_are_those_of_the_files(data_dir):
    dataset = open_dataset(section(data_dir))
    rows = dataset.rows(np.arange(dataset.size))
    np.testing.assert_array_equal(rows["image"], expected(TRAIN))
    assert rows["label"].tolist() == [0, 1, 2, 0, 1, 2, 0] and rows["label"].dtype == np.int32
    assert (dataset.image_shape, dataset.num_classes) == ((16, 16, 3), 3)


def test_splits_follow_each_other_and_rows_come_as_asked(data_dir):
    dataset = open_dataset(section(data_dir, split="validation+train", crop="authors"))
    order = [10, 0, 3, 4, 10]
    seeds = [[*VALIDATION, *TRAIN][i] for i in order]
    rows = dataset.rows(np.array(order))
    np.testing.assert_array_equal(rows["image"], expected(seeds, crops.authors))
    assert rows["label"].tolist() == [seed % 3 for seed in seeds]


def test_newest_version_unless_one_is_named(data_dir):
    assert open_dataset(section(data_dir)).size == len(TRAIN)
    old = open_dataset(section(data_dir, builder="like_imagenet:9.0.0"))
    assert old.size == len(VALIDATION)


def test_without_labels(data_dir):
    faces = open_dataset(section(data_dir, builder="like_celeb_a_hq/256", num_classes=1))
    np.testing.assert_array_equal(faces.rows(np.arange(7))["image"], expected(TRAIN))
    ignored = open_dataset(section(data_dir, num_classes=1))
    for dataset in (faces, ignored):
        assert set(dataset.rows(np.arange(7))["label"]) == {0}
    unlabelled = open_dataset(section(data_dir, split="test", num_classes=1))
    np.testing.assert_array_equal(unlabelled.rows(np.arange(2))["image"], expected(TEST))


def test_labels_that_the_files_do_not_have(data_dir):
    dataset = open_dataset(section(data_dir, split="test"))
    with pytest.raises(UserError) as error:
        dataset.rows(np.array([1]))
    fragments = ("like_imagenet 10.0.0, test, record 1", "_21.JPEG", "label -1", "num_classes=1")
    assert_sentence(str(error.value), fragments)


def test_fingerprint_covers_what_decides_the_rows(data_dir):
    changes = [
        {}, {"split": "validation"}, {"split": "train+validation"}, {"image_size": 15},
        {"crop": "authors"}, {"num_classes": 1}, {"builder": "like_imagenet:9.0.0"},
        {"split": "validation+train"},
    ]  # fmt: skip
    prints = [open_dataset(section(data_dir, **change)).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert open_dataset(section(data_dir, workers=3)).fingerprint == prints[0]


def test_reader_can_be_sent_to_a_process(data_dir):
    dataset = open_dataset(section(data_dir, split="train+validation"))
    again = pickle.loads(pickle.dumps(dataset.read))
    np.testing.assert_array_equal(
        again(np.arange(11))["image"], dataset.rows(np.arange(11))["image"]
    )


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"builder": "imagenet2013"}, ("data.builder=imagenet2013", "like_celeb_a_hq/256")),
        ({"builder": "like_imagenet:1.0.0"}, ("like_imagenet:10.0.0", "like_imagenet:9.0.0")),
        ({"builder": "like_celeb_a_hq"}, ("like_celeb_a_hq/256", "data.data_dir=")),
        ({"builder": ""}, ("data.builder=''", "imagenet2012")),
        ({"builder": "../x"}, ("data.builder='../x'", "imagenet2012")),
        ({"split": "training"}, ("data.split='training'", "train, validation, test")),
        ({"split": "train+val"}, ("no split 'val'", "train, validation, test")),
        ({"split": "train+train"}, ("data.split='train+train'", "once")),
        ({"split": "train[:10%]"}, ("data.split='train[:10%]'",)),
        ({"num_classes": 1000}, ("data.num_classes=1000", "has 3 classes", "or 1 to ignore")),
        (
            {"builder": "like_celeb_a_hq/256", "num_classes": 2},
            ("data.num_classes=2", "has 1 class (no labels)"),
        ),
    ],
)
def test_what_is_not_there(data_dir, changes, fragments):
    refused(data_dir, *fragments, **changes)


@pytest.fixture
def copied(data_dir, tmp_path) -> Path:
    """A data_dir with one set, to damage."""
    import shutil

    shutil.copytree(data_dir / "like_imagenet" / "10.0.0", tmp_path / "like_imagenet" / "10.0.0")
    return tmp_path


def test_tfrecord_names_the_command_that_converts(copied):
    path = copied / "like_imagenet" / "10.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    refused(copied, "tfrecord", f"tfds convert_format --dataset_version_dir={path.parent}")


def test_both_formats_are_read_as_array_record(copied):
    path = copied / "like_imagenet" / "10.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    path.write_text(json.dumps(info))
    read = pickle.loads(pickle.dumps(open_dataset(section(copied)).read))
    np.testing.assert_array_equal(read(np.arange(7))["image"], expected(TRAIN))


def test_missing_shard(copied):
    (path,) = copied.glob("like_imagenet/10.0.0/*-validation*")
    path.unlink()
    refused(copied, "lacks 1 of the 1 files", path.name, split="train+validation")
    assert open_dataset(section(copied)).size == 7  # the other split is whole


def test_damaged_metadata(copied):
    (copied / "like_imagenet" / "10.0.0" / "dataset_info.json").write_text("{")
    refused(copied, "like_imagenet/10.0.0", "cannot be opened")


def test_damaged_shard_names_the_record(copied):
    (path,) = copied.glob("like_imagenet/10.0.0/*-train*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError) as error:
        open_dataset(section(copied)).rows(np.arange(7))
    assert_sentence(str(error.value), ("like_imagenet 10.0.0, train, record", "ArrayRecord"))


def test_too_many_open_files_are_no_damage(data_dir):
    dataset = open_dataset(section(data_dir, split="train+validation"))
    dataset.rows(np.arange(1))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        dataset.rows(np.arange(7))  # of the shard that is open
        with pytest.raises(UserError) as error:
            dataset.rows(np.array([7]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_sentence(str(error.value), ("validation, record 0", f"have {free:,} files", "ulimit -n"))
    assert "prepare" not in str(error.value)


def test_record_that_cannot_be_decoded_is_named(copied):
    (path,) = copied.glob("like_imagenet/10.0.0/*-train*")
    features = images._open_builder(path.parent).info.features
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for seed in TRAIN:
        row = record(seed) | ({"image": encoded(seed)[:300]} if seed == 4 else {})
        writer.write(features.serialize_example(features.encode_example(row)))
    writer.close()
    dataset = open_dataset(section(copied))
    dataset.rows(np.array([3, 5]))
    with pytest.raises(UserError) as error:
        dataset.rows(np.array([3, 4]))
    named = ("like_imagenet 10.0.0, train, record 4", f"({CLASSES[1]}_4.JPEG)", "truncated")
    assert_sentence(str(error.value), named)


def test_pillow_keeps_memory_for_the_next_image(run_python):
    """It reads the setting once, when the first of many modules imports it."""
    code = "import shortcut_jax.data.images, PIL.Image; print(PIL.Image.core.get_blocks_max())"
    assert run_python(["-c", code]).stdout.strip() == "8"
    assert run_python(["-c", code], env={"PILLOW_BLOCKS_MAX": "3"}).stdout.strip() == "3"
