"""Fashion-MNIST: 70,000 grey images of clothes, 28x28 pixels padded to 32x32.

Read from TFDS's own copy when the data directory has one that needs no TensorFlow, otherwise built
from the four idx files that the authors publish (https://github.com/zalandoresearch/fashion-mnist).
"""

import functools
import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from shortcut_jax.data import sources
from shortcut_jax.errors import UserError

IDX_DIR = "/usr/share/datasets/fashion-mnist"
FIX = f"put the published file there (`apt-get install dataset-fashion-mnist` fills {IDX_DIR})"

IDX_PREFIX = {"train": "train", "test": "t10k"}
IDX_COUNT = {"train": 60_000, "test": 10_000}
# Of the unpacked files. MNIST's have the same names and shapes: only the bytes tell them apart.
IDX_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class FashionMnistIdx(sources.ArraysBuilder):
    """Fashion-MNIST, 28x28, in the order of the idx files."""

    VERSION = tfds.core.Version("1.0.0")
    IMAGE_SHAPE = (28, 28, 1)
    NUM_CLASSES = 10

    def __init__(self, *, idx_dir: str = IDX_DIR, **kwargs: Any) -> None:
        self._idx_dir = Path(idx_dir)
        super().__init__(**kwargs)

    def read_arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {split: read_idx_split(self._idx_dir, split) for split in IDX_PREFIX}


def read_idx_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads and checks the two idx files of a split, each gzipped or plain.

    Returns:
      uint8 images [n, 28, 28, 1] and uint8 labels [n].

    Raises:
      UserError: a file is missing, unreadable or not the one published.
    """
    prefix, count = IDX_PREFIX[split], IDX_COUNT[split]
    images = _read_idx_file(folder, f"{prefix}-images-idx3-ubyte", (count, 28, 28))
    labels = _read_idx_file(folder, f"{prefix}-labels-idx1-ubyte", (count,))
    return images[..., None], labels


def parse_idx(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Decodes an idx file: 0, 0, 8 for unsigned bytes, the rank, big-endian sizes, the values.

    Returns:
      uint8 array of the given shape.

    Raises:
      ValueError: the bytes are not a whole idx file of that type and shape.
    """
    magic, expected = data[:4], bytes([0, 0, 8, len(shape)])
    if magic != expected:
        raise ValueError(f"magic number 0x{magic.hex()}, expected 0x{expected.hex()}")
    header = 4 + 4 * len(shape)
    found = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    if found != shape:
        raise ValueError(f"array of shape {found}, expected {shape}")
    return np.frombuffer(data[header:], np.uint8).reshape(shape)


def pad(images: np.ndarray) -> np.ndarray:
    """Surrounds images [n, 28, 28, 1] with two black pixels: [n, 32, 32, 1]."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def open_split(section: Mapping[str, Any], data_dir: Path) -> sources.Dataset:
    """Opens Fashion-MNIST, preparing it on first use.

    Args:
      section: its idx_dir is the folder of the idx files; "" or absent for the one of Debian's
        package. Read only when `data_dir` has no prepared copy.
      data_dir: folder of prepared data.

    Raises:
      UserError: the idx files are needed and something is wrong with them, or `data_dir` cannot be
        written.
    """
    make_builder = functools.partial(FashionMnistIdx, idx_dir=section.get("idx_dir") or IDX_DIR)
    builder = _prepared_by_tfds(data_dir) or sources.prepare(make_builder, data_dir)
    rows = sources.load_split(builder, section["split"])
    rows["image"] = pad(rows["image"])
    return sources.in_memory(section["name"], section["split"], rows, builder)


def _prepared_by_tfds(data_dir: Path) -> tfds.core.DatasetBuilder | None:
    builder = tfds.builder("fashion_mnist", data_dir=data_dir)
    readable = tfds.core.FileFormat.with_random_access() & builder.info.available_file_formats()
    return builder if sources.is_prepared(builder) and readable else None


def _read_idx_file(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    candidates = [folder / f"{name}.gz", folder / name]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(
            f"idx_dir={folder} has neither {name}.gz nor {name}, from which Fashion-MNIST is made; "
            f"{FIX} or set idx_dir to the folder that has it."
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(math.prod(shape) + 100)  # no more, whatever it unpacks to
        array = parse_idx(data, shape)
        digest = hashlib.sha256(data).hexdigest()
        if digest != IDX_SHA256[name]:
            raise ValueError(f"unpacked sha256 {digest}, expected {IDX_SHA256[name]}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is not Fashion-MNIST's {name} ({error}); {FIX}.") from error
    return array
