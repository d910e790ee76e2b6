"""Fashion-MNIST from idx files or TFDS's own copy. Small made-up files stand in for the real."""

import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from shortcut_jax.data import fashion_mnist, open_dataset
from shortcut_jax.errors import UserError

COUNTS = {"train": 30, "test": 20}
INSTALL = "apt-get install dataset-fashion-mnist"


def to_idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        split: (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            rng.integers(0, 10, count, np.uint8),
        )
        for split, count in COUNTS.items()
    }


@pytest.fixture
def idx_dir(tmp_path, monkeypatch, arrays):
    """A folder of four small files, which the code is told to take for the published ones."""
    folder = tmp_path / "idx"
    folder.mkdir()
    digests = {}
    for split, prefix in fashion_mnist.IDX_PREFIX.items():
        images, labels = arrays[split]
        for name, array in [
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ]:
            digests[name] = hashlib.sha256(to_idx(array)).hexdigest()
            (folder / f"{name}.gz").write_bytes(gzip.compress(to_idx(array)))
    monkeypatch.setattr(fashion_mnist, "IDX_COUNT", COUNTS)
    monkeypatch.setattr(fashion_mnist, "IDX_SHA256", digests)
    return folder


def open_rows(data_dir: Path, idx_dir: Path, split: str = "train"):
    section = {"name": "fashion_mnist", "split": split, "data_dir": str(data_dir)}
    dataset = open_dataset({**section, "idx_dir": str(idx_dir)})
    return dataset.rows(np.arange(dataset.size))


def unzip(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_padded_to_32(tmp_path, idx_dir, arrays, zipped):
    if not zipped:
        unzip(idx_dir)
    rows = open_rows(tmp_path / "tfds", idx_dir, "train+test")
    images = np.concatenate([arrays["train"][0], arrays["test"][0]])
    assert rows["image"].shape == (50, 32, 32, 1) and rows["image"].dtype == np.uint8
    np.testing.assert_array_equal(rows["image"][:, 2:30, 2:30, 0], images)
    assert rows["image"].sum(dtype=int) == images.sum(dtype=int)  # The border is black.
    labels = np.concatenate([arrays["train"][1], arrays["test"][1]])
    np.testing.assert_array_equal(rows["label"], labels)


def test_prepared_data_need_no_idx_files(tmp_path, idx_dir):
    first = open_rows(tmp_path / "tfds", idx_dir, "test")
    again = open_rows(tmp_path / "tfds", tmp_path / "nowhere", "test")
    np.testing.assert_array_equal(first["image"], again["image"])


def test_missing_file(tmp_path, idx_dir):
    (idx_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=f"idx_dir=.*t10k-labels-idx1-ubyte.gz.*{INSTALL}"):
        open_rows(tmp_path / "tfds", idx_dir)
    assert not (tmp_path / "tfds" / "fashion_mnist_idx").exists()


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=f"nowhere has neither .*{INSTALL}"):
        open_rows(tmp_path / "tfds", tmp_path / "nowhere")


def wrong_magic(data: bytes) -> bytes:
    return bytes([0, 0, 13, 3]) + data[4:]


def wrong_count(data: bytes) -> bytes:
    return to_idx(np.zeros((29, 28, 28), np.uint8))


def cut_short(data: bytes) -> bytes:
    return data[:-1]


def cut_in_the_header(data: bytes) -> bytes:
    return data[:10]


def other_content(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_magic, "magic number 0x00000d03, expected 0x00000803"),
        (wrong_count, r"shape \(29, 28, 28\), expected \(30, 28, 28\)"),
        (cut_short, "cannot reshape"),
        (cut_in_the_header, "multiple of element size"),
        (other_content, "sha256 .*, expected "),
    ],
)
def test_wrong_content(tmp_path, idx_dir, spoil, message):
    path = idx_dir / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(spoil(gzip.decompress(path.read_bytes()))))
    with pytest.raises(UserError, match=f"{path.name}.*{message}.*{INSTALL}"):
        open_rows(tmp_path / "tfds", idx_dir)


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"PK" + data])
def test_broken_gzip(tmp_path, idx_dir, spoil):
    path = idx_dir / "train-labels-idx1-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path.name}.*{INSTALL}"):
        open_rows(tmp_path / "tfds", idx_dir)


@pytest.fixture
def tfds_copy(tmp_path, arrays) -> Path:
    """A data directory with a `fashion_mnist` as TFDS prepares it, images as PNG."""
    from PIL import Image

    def png(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    with tfds.core.registered.skip_registration():

        class FashionMnist(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.1")
            code_path = None  # See sources.ArraysBuilder.

            def _info(self):
                image = tfds.features.Image(shape=(28, 28, 1))
                label = tfds.features.ClassLabel(num_classes=10)
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(*arrays[split]) for split in arrays}

            def _generate_examples(self, images, labels):
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield index, {"image": png(image), "label": int(label)}

    data_dir = tmp_path / "tfds"
    FashionMnist(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return data_dir


def test_tfds_own_copy_is_used(tmp_path, tfds_copy, arrays):
    rows = open_rows(tfds_copy, tmp_path / "nowhere")
    np.testing.assert_array_equal(rows["image"][:, 2:30, 2:30, 0], arrays["train"][0])
    np.testing.assert_array_equal(rows["label"], arrays["train"][1])
    assert rows["image"].shape == (30, 32, 32, 1)


def test_tfds_copy_that_needs_tensorflow_is_left_alone(tfds_copy, idx_dir, arrays):
    info = tfds_copy / "fashion_mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    rows = open_rows(tfds_copy, idx_dir)
    np.testing.assert_array_equal(rows["image"][:, 2:30, 2:30, 0], arrays["train"][0])
    assert (tfds_copy / "fashion_mnist_idx" / "1.0.0").is_dir()


@pytest.mark.skipif(
    not Path(fashion_mnist.IDX_DIR).is_dir(), reason=f"needs Fashion-MNIST: {INSTALL}"
)
def test_the_packaged_files():
    for split, per_class in [("train", 6000), ("test", 1000)]:
        images, labels = fashion_mnist.read_idx_split(Path(fashion_mnist.IDX_DIR), split)
        assert images.shape == (10 * per_class, 28, 28, 1)
        assert np.bincount(labels).tolist() == [per_class] * 10
