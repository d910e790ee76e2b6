"""What the rest of the code sees of a data set, and how one is prepared on first use."""

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from shortcut_jax.errors import UserError

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A finite set of labelled images, read by index.

    Attributes:
      name: name in the registry.
      split: split it was opened with, for example "train+test".
      image_shape: (H, W, C).
      num_classes: labels are 0..num_classes-1.
      size: number of rows.
      has_mirrors: rows size..2 * size - 1 are the rows 0..size-1 mirrored left-right.
      holds: what an image is to the trainer: "images" [H, W, C], "moments" of their latents
        (`shortcut_jax.latent_cache`), or "samples", x_1 itself (`shortcut_jax.pairs`).
      dtype: of the images in a batch.
      fingerprint: 16 hexadecimal digits, the same only for the same rows in the same order. For a
        set that is read from disk as needed it covers the builder, version, split and size only.
      read: reads the rows at an int array of indices; use `rows`, which checks them.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    size: int
    fingerprint: str
    read: Callable[[np.ndarray], Rows] = dataclasses.field(repr=False, compare=False)
    has_mirrors: bool = False
    holds: Literal["images", "moments", "samples"] = "images"
    dtype: np.dtype = np.dtype(np.float32)

    def rows(self, indices: np.ndarray) -> Rows:
        """Returns the rows at `indices`, which may repeat and be in any order.

        Args:
          indices: int [n], 0..size-1 (2 * size - 1 where there are mirrors), n >= 1.

        Returns:
          {"image": uint8 [n, H, W, C] in 0..255, "label": int32 [n] in 0..num_classes-1}; or, for
          what a network made, float32 images as it sees them, and more (`shortcut_jax.pairs`).

        Raises:
          IndexError: there is no such row.
        """
        indices = np.asarray(indices)
        end = 2 * self.size if self.has_mirrors else self.size
        if indices.min() < 0 or indices.max() >= end:
            raise IndexError(
                f"indices {indices.min()}..{indices.max()} into {self.name} {self.split}, "
                f"which has rows 0..{end - 1}"
            )
        return self.read(indices)


def in_memory(name: str, split: str, rows: Rows, builder: tfds.core.DatasetBuilder) -> Dataset:
    """Wraps decoded rows (as `Dataset.rows` returns them) that stay in memory."""
    images, labels = rows["image"], rows["label"]
    return Dataset(
        name=name,
        split=split,
        image_shape=images.shape[1:],
        num_classes=builder.info.features["label"].num_classes,
        size=len(images),
        fingerprint=_fingerprint(builder, split, len(images), images, labels),
        read=lambda indices: {"image": images[indices], "label": labels[indices]},
    )


def on_disk(
    name: str, split: str, source: Sequence[Any], builder: tfds.core.DatasetBuilder
) -> Dataset:
    """Wraps a random-access source (see `read_records`) that is too large to hold in memory."""
    return Dataset(
        name=name,
        split=split,
        image_shape=builder.info.features["image"].shape,
        num_classes=builder.info.features["label"].num_classes,
        size=len(source),
        fingerprint=_fingerprint(builder, split, len(source)),
        read=lambda indices: read_records(source, indices),
    )


def read_records(source: Any, indices: np.ndarray) -> Rows:
    """Reads and decodes records of a TFDS data source whose images have one common shape.

    Args:
      source: `__getitems__(list of int)` gives records {"image": uint8 [H, W, C], "label": int}.
      indices: int [n], n >= 1.

    Returns:
      As `Dataset.rows`.
    """
    records = source.__getitems__(indices.tolist())
    return {
        "image": np.stack([record["image"] for record in records]),
        "label": np.array([record["label"] for record in records], np.int32),
    }


def load_split(builder: tfds.core.DatasetBuilder, split: str) -> Rows:
    """Decodes every row of a prepared split; "train+test" is train followed by test."""
    sources = [builder.as_data_source(split=part) for part in split.split("+")]
    parts = [read_records(source, np.arange(len(source))) for source in sources]
    return {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label")}


class ArraysBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the TFDS builders whose source is small enough to be read whole.

    A subclass sets VERSION, IMAGE_SHAPE (H, W, C) and NUM_CLASSES, and its docstring becomes the
    description. Its `read_arrays` returns, per split, uint8 images [n, H, W, C] and int labels [n].
    """

    IMAGE_SHAPE: tuple[int, int, int]
    NUM_CLASSES: int
    # TFDS looks next to the code for checksums of downloads, of which there are none here, and to
    # do so it imports importlib_resources, which it does not declare as a dependency.
    code_path = None

    @abc.abstractmethod
    def read_arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]: ...

    def _info(self) -> tfds.core.DatasetInfo:
        # Image() would need TensorFlow to encode an array; raw bytes are also the fastest to read.
        image = tfds.features.Tensor(
            shape=self.IMAGE_SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(num_classes=self.NUM_CLASSES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            # Keeps the order of the source, which then does not depend on TFDS's hash function.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        arrays = self.read_arrays()
        return {split: self._generate_examples(*arrays[split]) for split in arrays}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": int(label)}


def prepare(
    make_builder: Callable[..., tfds.core.DatasetBuilder], data_dir: Path
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set in `data_dir`, generating its files if they are not there.

    Safe when several processes start at once and when one is killed: each generates into a
    directory of its own, and only a whole data set is renamed to its final place. The first rename
    wins, the other processes then use its files. (TFDS renames too, but names its temporary
    directory from the global `random`, which two processes with the same seed share.) A killed
    process leaves an `incomplete.*` folder in `data_dir`, which nothing reads.

    Args:
      make_builder: called with `data_dir=` only.
      data_dir: local folder, created if needed; only read when the data set is there already.

    Raises:
      UserError: `data_dir` cannot be written.
    """
    builder = make_builder(data_dir=data_dir)
    if is_prepared(builder):
        return builder
    logging.info("Preparing the data set %s in %s", builder.name, data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        prefix = f"incomplete.{builder.name}."
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=data_dir, ignore_cleanup_errors=True
        ) as scratch:
            generated = make_builder(data_dir=scratch)
            _generate(generated)
            _move(Path(generated.data_dir), Path(builder.data_dir))
    except OSError as error:
        raise UserError(
            f"The data set {builder.name} cannot be written to data.data_dir={data_dir} ({error}); "
            "expected a local folder that can be written: set it or $TFDS_DATA_DIR to one."
        ) from error
    return make_builder(data_dir=data_dir)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the files of `builder` are in place. (TFDS's own check warns when they are not.)"""
    return (Path(builder.data_dir) / "dataset_info.json").is_file()


def _generate(builder: tfds.core.DatasetBuilder) -> None:
    tfds.disable_progress_bar()
    # TFDS announces the temporary directory on stdout, in bold, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")


def _move(generated: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(generated, final)
    except OSError:
        if not (final / "dataset_info.json").is_file():
            raise
        logging.info("Another process has prepared %s in the meantime", final)


def _fingerprint(
    builder: tfds.core.DatasetBuilder, split: str, size: int, *arrays: np.ndarray
) -> str:
    identity = [builder.name, str(builder.version), split, size]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
