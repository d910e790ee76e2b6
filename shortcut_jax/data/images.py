"""Photographs: any image set that TFDS or shortcut_jax.prepare has written as ArrayRecord.

Nothing is prepared here and TensorFlow is not needed: the encoded bytes of a record are read by
index, decoded with Pillow and cropped (`shortcut_jax.data.crops`). docs/data.md tells how a set
gets there.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from shortcut_jax.data import crops
from shortcut_jax.data.sources import Dataset, Rows
from shortcut_jax.errors import UserError
from shortcut_jax.files import open_files_limit, too_many_open

MANIFEST = "manifest.json"  # beside a set that shortcut_jax.prepare has made
GUIDE = "see docs/data.md"
TFDS_FEATURES = "tensorflow_datasets.core.features."


@dataclasses.dataclass(frozen=True)
class Part:
    """A split on disk.

    Attributes:
      name: for messages.
      source: random access to records whose image is still encoded. It can be pickled.
      size: number of records.
      image, label, file_name: names of the features; None where there is no such feature.
    """

    name: str
    source: Any = dataclasses.field(repr=False)
    size: int
    image: str
    label: str | None
    file_name: str | None

    def record(self, index: int) -> dict[str, Any]:
        """The record at an index; a UserError names it if the file cannot be read."""
        try:
            return self.source[index]
        except Exception as error:  # array_record raises several kinds for damaged files
            if too_many_open(error):  # nothing is wrong with the set
                raise UserError(
                    f"{self.name}, record {index}: its ArrayRecord file cannot be opened, because "
                    f"this process may have {open_files_limit():,} files open and each shard stays "
                    "open; expected a limit above the number of shards: raise it with `ulimit -n "
                    f"65536` and give the same command again, {GUIDE}."
                ) from error
            raise UserError(
                f"{self.name}, record {index}: its ArrayRecord file cannot be read "
                f"({' '.join(str(error).split())}); expected a whole file: prepare the set again, "
                f"{GUIDE}."
            ) from error

    def describe(self, index: int, record: Mapping[str, Any]) -> str:
        """Builder, split and index of a record, and its file if that was noted."""
        named = f" ({_text(record[self.file_name])})" if self.file_name else ""
        return f"{self.name}, record {index}{named}"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads rows of several splits, one after the other; can be pickled.

    Attributes:
      parts: the splits.
      image_size, crop, num_classes: as in the config.
    """

    parts: tuple[Part, ...]
    image_size: int
    crop: str
    num_classes: int

    def __call__(self, indices: np.ndarray) -> Rows:
        """Returns {"image": uint8 [n, image_size, image_size, 3], "label": int32 [n]}.

        Raises:
          UserError: a record cannot be read or decoded, or its label is not 0..num_classes-1.
        """
        images = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        for row, index in enumerate(indices):
            images[row], labels[row] = self._read(int(index))
        return {"image": images, "label": labels}

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        starts = list(itertools.accumulate([part.size for part in self.parts], initial=0))
        which = bisect.bisect_right(starts, index) - 1
        part, position = self.parts[which], index - starts[which]
        record = part.record(position)
        try:
            image = crops.CROPS[self.crop](crops.decode(record[part.image]), self.image_size)
        except ValueError as error:
            raise UserError(
                f"{part.describe(position, record)} cannot be decoded ({error}); expected an "
                "encoded image: mend the source and prepare the set again, leaving it out if need "
                f"be, {GUIDE}."
            ) from error
        label = 0 if part.label is None else int(record[part.label])
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{part.describe(position, record)} has label {label}; expected 0 to "
                f"{self.num_classes - 1}: set data.num_classes=1 if this split has no labels."
            )
        return image, label


def open_split(section: Mapping[str, Any], data_dir: Path) -> Dataset:
    """Opens a prepared set.

    Args:
      section: name, split, builder, image_size, crop and num_classes, as in the config.
      data_dir: folder of prepared sets.

    Raises:
      UserError: there is no such set or split, it cannot be read without TensorFlow, files are
        missing, or it has another number of classes.
    """
    asked, split, num_classes = section["builder"], section["split"], section["num_classes"]
    directory = find_directory(asked, data_dir)
    builder = _open_builder(directory)
    _check_split(builder, split, directory)
    image, label, file_name = _feature_names(builder, directory)
    found = builder.info.features[label].num_classes if label else 1
    if num_classes not in (1, found):
        raise UserError(
            f"data.num_classes={num_classes}, but {asked} in {directory} has {found} class"
            f"{'es' if found > 1 else ' (no labels)'}; expected that number"
            f"{', or 1 to ignore the labels' if found > 1 else ''}: change data.num_classes."
        )
    label = None if num_classes == 1 else label
    skip = {image: tfds.decode.SkipDecoding()}
    parts = []
    for name in split.split("+"):
        source = builder.as_data_source(split=name, decoders=skip)
        title = f"{asked} {builder.version}, {name}"
        parts.append(Part(title, source, len(source), image, label, file_name))
    settings = {key: section[key] for key in ("image_size", "crop", "num_classes")}
    return Dataset(
        name=asked,
        split=split,
        image_shape=(section["image_size"], section["image_size"], 3),
        num_classes=num_classes,
        size=sum(part.size for part in parts),
        fingerprint=_fingerprint(builder, split, directory, settings),
        read=Reader(tuple(parts), **settings),
    )


def find_directory(asked: str, data_dir: Path) -> Path:
    """The folder of a prepared set in its newest version, or the one asked for.

    Args:
      asked: "builder", "builder/config", or either with ":version".
      data_dir: folder of prepared sets.

    Raises:
      UserError: there is none.
    """
    match = re.fullmatch(r"(\w+(?:/[\w.+-]+)?)(?::(\d+\.\d+\.\d+))?", asked)
    if not match:
        raise UserError(
            f"data.builder={asked!r} is not the name of an image set; expected builder, "
            "builder/config or either with :version, such as imagenet2012, lsun/bedroom or "
            "imagenet2012:5.1.0: set it to one."
        )
    name, version = match.groups()
    versions = _versions(data_dir / name)
    if version in versions or (versions and version is None):
        return data_dir / name / (version or versions[-1])
    there = [f"{name}:{found}" for found in versions] or sorted(
        str(path.parent.relative_to(data_dir))
        for pattern in ("*/*", "*/*/*")
        for path in data_dir.glob(pattern)
        if path.name in _versions(path.parent)
    )
    listed = ", ".join(dict.fromkeys(there)) or "nothing"
    raise UserError(
        f"data.builder={asked} is not prepared in data.data_dir={data_dir}, which holds {listed}; "
        f"expected a folder {name}/VERSION with dataset_info.json: mend one of the two keys, or "
        f"prepare it ({GUIDE})."
    )


def _versions(folder: Path) -> list[str]:
    """Versions of a set with files in place, oldest first."""
    found = [path.parent.name for path in folder.glob("*/dataset_info.json")]
    found = [version for version in found if re.fullmatch(r"\d+\.\d+\.\d+", version)]
    return sorted(found, key=lambda version: [int(number) for number in version.split(".")])


def _refuse_foreign_features(directory: Path) -> None:
    """TFDS imports whatever module features.json names; only its own features may be named.

    Raises:
      ValueError: another one is.
    """
    path = directory / "features.json"
    todo = [json.loads(path.read_text())] if path.is_file() else []
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            for key in ("pythonClassName", "python_class_name", "type"):  # all are understood
                name = node.get(key)
                if isinstance(name, str) and not name.startswith(TFDS_FEATURES):
                    raise ValueError(f"{path.name} names {name!r:.100}, no feature of TFDS")
        if isinstance(node, dict | list):
            todo += node.values() if isinstance(node, dict) else node


def _open_builder(directory: Path) -> tfds.core.DatasetBuilder:
    try:
        _refuse_foreign_features(directory)
        builder = tfds.builder_from_directory(directory)
        formats = {found.value for found in builder.info.available_file_formats()}
        if "array_record" in formats:  # perhaps beside tfrecord, after `tfds convert_format`
            builder.info.set_file_format(
                "array_record", override=True, override_if_initialized=True
            )
    except Exception as error:  # JSON, protobuf and TFDS each have their own for damaged metadata
        raise UserError(
            f"{directory} cannot be opened as a set that TFDS has prepared "
            f"({' '.join(str(error).split())}); expected its dataset_info.json and features.json: "
            f"prepare it again, {GUIDE}."
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"{directory} is prepared as {' and '.join(sorted(formats))}, which cannot be read by "
            "index; expected array_record: run `tfds convert_format --dataset_version_dir="
            f"{directory} --out_file_format=array_record` where the extra tfds-prepare is "
            f"installed, {GUIDE}."
        )
    return builder


def _check_split(builder: tfds.core.DatasetBuilder, split: str, directory: Path) -> None:
    there = [name for name, info in builder.info.splits.items() if info.num_examples]
    for name in split.split("+"):
        if name not in there:
            raise UserError(
                f"data.split={split!r}: {directory} has no split {name!r}; expected one or more "
                f"of {', '.join(there)}, joined by +: change data.split."
            )
        files = [Path(path) for path in builder.info.splits[name].filepaths]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(
                f"{directory} lacks {len(missing)} of the {len(files)} files of split {name} (the "
                f"first: {missing[0]}); expected all: copy them there or prepare the set again, "
                f"{GUIDE}."
            )


def _feature_names(
    builder: tfds.core.DatasetBuilder, directory: Path
) -> tuple[str, str | None, str | None]:
    """Which features are the image, the label and the name of the file."""
    features = builder.info.features

    def named(kind: type, preferred: str) -> list[str]:
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        return [preferred] if preferred in names else names

    images = named(tfds.features.Image, "image")
    if len(images) != 1:
        raise UserError(
            f"{directory} has {len(images)} image features ({', '.join(features)}); expected one, "
            "or one called image: name another set in data.builder."
        )
    labels = named(tfds.features.ClassLabel, "label")
    texts = named(tfds.features.Text, "file_name")
    return images[0], labels[0] if len(labels) == 1 else None, texts[0] if texts else None


def _fingerprint(
    builder: tfds.core.DatasetBuilder, split: str, directory: Path, settings: Mapping[str, Any]
) -> str:
    manifest = directory / MANIFEST
    splits = json.loads(manifest.read_text())["splits"] if manifest.is_file() else {}
    identity = [builder.info.full_name, dict(settings)]
    for name in split.split("+"):
        info = builder.info.splits[name]
        digest = splits.get(name, {}).get("digest")  # None for what TFDS has prepared
        identity.append([name, info.shard_lengths, info.num_bytes, digest])
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
