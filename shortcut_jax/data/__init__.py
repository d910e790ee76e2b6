"""Data sets by name. To add one, write a module with `open_split` and add a line to DATASETS."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from shortcut_jax.errors import UserError

if TYPE_CHECKING:  # TFDS is imported only when data is opened.
    from shortcut_jax.data.sources import Dataset


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before any of it is read or prepared.

    Attributes:
      module: has `open_split(name, split, data_dir, idx_dir) -> Dataset`.
      image_shape: (H, W, C) of the opened data set.
      num_classes: labels are 0..num_classes-1.
      splits: names that a split may be put together from with "+".
    """

    module: str
    image_shape: tuple[int, int, int]
    num_classes: int
    splits: tuple[str, ...] = ("train", "test")


DATASETS = {
    "digits": DatasetSpec("shortcut_jax.data.digits", (8, 8, 1), 10),
    "fashion_mnist": DatasetSpec("shortcut_jax.data.fashion_mnist", (32, 32, 1), 10),
}


def describe(name: str) -> tuple[tuple[int, int, int], int]:
    """Returns (image_shape, num_classes) of a data set without reading or preparing it.

    Raises:
      UserError: there is no data set of this name.
    """
    spec = _find(name)
    return spec.image_shape, spec.num_classes


def check_split(name: str, split: str) -> None:
    """Raises UserError unless `split` is made of splits of the data set, each at most once."""
    known = _find(name).splits
    parts = split.split("+")
    if not set(parts) <= set(known) or len(set(parts)) != len(parts):
        raise UserError(
            f"data.split={split!r} is not a split of the data set {name}; expected one or more of "
            f"{', '.join(known)}, each once, joined by + (for example {'+'.join(known)!r})."
        )


def open_dataset(name: str, *, split: str, data_dir: str = "", idx_dir: str = "") -> Dataset:
    """Opens a data set, preparing its files on first use.

    Args:
      name: key of DATASETS.
      split: "train", "test", or several joined by "+", whose rows then follow each other.
      data_dir: local folder of prepared data; "" for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      idx_dir: folder of the idx files that fashion_mnist is prepared from; "" for the place where
        Debian's package puts them. Other data sets do not look at it.

    Raises:
      UserError: unknown name or split, missing or wrong source files, unusable `data_dir`.
    """
    check_split(name, split)
    module = importlib.import_module(_find(name).module)
    return module.open_split(name, split, _local_data_dir(data_dir), idx_dir)


def _find(name: str) -> DatasetSpec:
    if name not in DATASETS:
        raise UserError(
            f"There is no data set {name!r}; expected one of {', '.join(sorted(DATASETS))}."
        )
    return DATASETS[name]


def _local_data_dir(data_dir: str) -> Path:
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise UserError(
            f"data.data_dir={chosen} is a remote address, expected a local folder; set "
            "data.data_dir or $TFDS_DATA_DIR to one."
        )
    return Path(chosen).expanduser()
