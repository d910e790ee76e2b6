"""Data sets by name. To add one, write a module with `open_split` and add a line to DATASETS.

What the functions here take is the config's data section: a mapping with `name`, `split`, perhaps
`data_dir`, and the keys of that data set.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut_jax.errors import UserError

if TYPE_CHECKING:  # TFDS is imported only when data is opened.
    from shortcut_jax.data.sources import Dataset

# Blocks of memory that Pillow keeps for the next image. Left to itself it keeps none, and getting
# new ones takes a quarter of the time of decoding and cropping. Read when PIL is imported, which
# TFDS does; worker processes inherit it.
os.environ.setdefault("PILLOW_BLOCKS_MAX", "8")


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before any of it is read or prepared.

    Attributes:
      module: has `open_split(section, data_dir) -> Dataset`.
      image_shape: (H, W, C) of the opened data set; None where key image_size says it, for RGB.
      num_classes: labels are 0..num_classes-1; None where the key of that name says it.
      splits: names that a split may be put together from with "+"; () where the files say it.
      needs: keys of the data section that this data set must have.
      takes: keys that it may have.
    """

    module: str
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    splits: tuple[str, ...] = ("train", "test")
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


COMMON_KEYS = ("name", "split", "data_dir", "flip")  # of every data section
IMAGES_KEYS = ("builder", "image_size", "crop", "num_classes", "workers")

DATASETS = {
    "digits": DatasetSpec("shortcut_jax.data.digits", (8, 8, 1), 10),
    "fashion_mnist": DatasetSpec(
        "shortcut_jax.data.fashion_mnist", (32, 32, 1), 10, takes=("idx_dir",)
    ),
    "images": DatasetSpec(
        "shortcut_jax.data.images", None, None, splits=(), needs=IMAGES_KEYS, takes=("latents",)
    ),
}


def describe(section: Mapping[str, Any]) -> tuple[tuple[int, int, int], int]:
    """Returns (image_shape, num_classes) of a data set without reading or preparing it.

    Raises:
      UserError: there is no data set of this name, or it lacks a key or has one too many.
    """
    spec = _find(section)
    size = section.get("image_size", 0)
    return spec.image_shape or (size, size, 3), spec.num_classes or section["num_classes"]


def check_split(section: Mapping[str, Any]) -> None:
    """Raises UserError unless the split is made of splits of the data set, each at most once."""
    known, split = _find(section).splits, section["split"]
    parts = split.split("+")
    good = set(parts) <= set(known) if known else all(re.fullmatch(r"\w+", part) for part in parts)
    if not good or len(set(parts)) != len(parts):
        known = known or ("train", "validation")
        raise UserError(
            f"data.split={split!r} is not a split of the data set {section['name']}; expected one "
            f"or more of {', '.join(known)}, each once, joined by + (for example "
            f"{'+'.join(known)!r})."
        )


def origin(section: Mapping[str, Any]) -> dict[str, str | None]:
    """Which images a section reads: builder, split and crop, None where it has no such thing.

    The builder of a data set that has just one is the name of the data set.
    """
    builder = section.get("builder", section["name"])
    return {"builder": builder, "split": section["split"], "crop": section.get("crop")}


def open_dataset(section: Mapping[str, Any]) -> Dataset:
    """Opens a data set; digits and fashion_mnist prepare their files on first use.

    Args:
      section: the data section of a config, with at least
        name: key of DATASETS.
        split: "train", "test", or several joined by "+", whose rows then follow each other.
        data_dir: local folder of prepared data; "" or absent for $TFDS_DATA_DIR or
          ~/tensorflow_datasets.

    Raises:
      UserError: unknown name or split, wrong keys, missing or wrong files, unusable `data_dir`.
    """
    check_split(section)
    module = importlib.import_module(_find(section).module)
    return module.open_split(section, local_data_dir(section.get("data_dir", "")))


def local_data_dir(data_dir: str, key: str = "data.data_dir") -> Path:
    """The folder of prepared data, "" for the usual one.

    Args:
      data_dir: what was asked for.
      key: the key or flag it came from, for messages.

    Raises:
      UserError: it is a remote address.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise UserError(
            f"{key}={chosen} is a remote address, expected a local folder; set {key} or "
            "$TFDS_DATA_DIR to one."
        )
    return Path(chosen).expanduser()


def _find(section: Mapping[str, Any]) -> DatasetSpec:
    name = section["name"]
    if name not in DATASETS:
        raise UserError(
            f"There is no data set {name!r}; expected one of {', '.join(sorted(DATASETS))}."
        )
    spec = DATASETS[name]
    own = (*spec.needs, *spec.takes)
    missing = [key for key in spec.needs if key not in section]
    foreign = sorted(set(section) - set(own) - set(COMMON_KEYS))
    if missing or foreign:
        found = [f"has no data.{key}" for key in missing] + [f"has data.{key}" for key in foreign]
        keys = ", ".join(f"data.{key}" for key in own) or "none of its own"
        raise UserError(
            f"data.name={name}: the config {' and '.join(found)}, but the keys of that data set "
            f"are {keys}; expected just these: start from the config file of that data set."
        )
    return spec
