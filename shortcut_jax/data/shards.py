"""Writes image files as TFDS writes them: ArrayRecord shards and the metadata that describe them.

A shard is one piece of work: its files are read, checked and written by one process, and its record
(what went in, what was corrupt) is written last. A shard whose record is there and was made from
the same files is not made again.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shortcut_jax.data import crops
from shortcut_jax.data.image_files import Entry, Source
from shortcut_jax.errors import UserError
from shortcut_jax.files import write_atomically

FORMAT = 1  # raised when what a shard holds changes, so that no old one is kept
SHARD_FILES, SHARD_BYTES = 1024, 128 * 2**20
VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What goes into one file: the images, in order, each with its label."""

    index: int
    entries: tuple[Entry, ...]
    labels: tuple[int, ...]

    def key(self, class_names: Sequence[str]) -> str:
        """16 digits that change with anything that would change the shard."""
        files = [dataclasses.astuple(entry) for entry in self.entries]
        text = json.dumps([FORMAT, files, self.labels, list(class_names)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(entries: Sequence[Entry], labels: Sequence[int]) -> list[Shard]:
    """Deals files to shards in order: a shard ends at SHARD_FILES or before SHARD_BYTES."""
    shards: list[list[tuple[Entry, int]]] = [[]]
    size = 0
    for entry, label in zip(entries, labels, strict=True):
        if shards[-1] and (len(shards[-1]) == SHARD_FILES or size + entry.size > SHARD_BYTES):
            shards.append([])
            size = 0
        shards[-1].append((entry, label))
        size += entry.size
    return [
        Shard(index, tuple(entry for entry, _ in pairs), tuple(label for _, label in pairs))
        for index, pairs in enumerate(shards)
    ]


@dataclasses.dataclass(frozen=True)
class Target:
    """A split that is being written; can be pickled.

    Attributes:
      directory: data_dir/name/VERSION.
      name: of the set.
      split: of the set.
      class_names: in the order of their labels.
      num_shards: of the split.
    """

    directory: Path
    name: str
    split: str
    class_names: tuple[str, ...]
    num_shards: int

    @property
    def progress(self) -> Path:
        """Folder of the records while the split is incomplete."""
        return self.directory / f"incomplete.{self.split}"

    def shard_path(self, index: int) -> Path:
        count = f"{index:05d}-of-{self.num_shards:05d}"
        return self.directory / f"{self.name}-{self.split}.array_record-{count}"

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """The record of a shard that need not be made again."""
        try:
            record = json.loads(self._record_path(shard).read_bytes())
            size = self.shard_path(shard.index).stat().st_size
        except (OSError, ValueError):
            return None
        whole = [record["key"], record["bytes_of_file"]] == [shard.key(self.class_names), size]
        return record if whole else None

    def write(self, source: Source, shard: Shard) -> dict[str, Any]:
        """Checks the images of a shard and writes those that can be decoded, bytes unchanged.

        Returns:
          Its record: "count" and "num_bytes" of what was written, "files" as lists (path, label,
          size, sha256), "corrupt" as lists (path, reason).

        Raises:
          UserError: the shard cannot be written.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        features = make_features(self.class_names)
        path = self.shard_path(shard.index)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        files, corrupt, num_bytes = [], [], 0
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            opened = source.open()
            for entry, label in zip(shard.entries, shard.labels, strict=True):
                try:
                    data = opened.read(entry.path)
                    crops.decode(data)
                except MemoryError:
                    raise
                except Exception as error:  # disks, zip and decoders each have their own
                    corrupt.append([entry.path, " ".join(str(error).split())])
                    continue
                example = {"image": data, "label": label, "file_name": entry.path}
                serialized = features.serialize_example(features.encode_example(example))
                writer.write(serialized)
                num_bytes += len(serialized)
                files.append([entry.path, label, len(data), hashlib.sha256(data).hexdigest()])
            writer.close()
            os.replace(temporary, path)
            record = {
                "key": shard.key(self.class_names),
                "count": len(files),
                "num_bytes": num_bytes,
                "bytes_of_file": path.stat().st_size,
                "files": files,
                "corrupt": corrupt,
            }
            write_atomically(self._record_path(shard), json.dumps(record).encode())
            return record
        except (OSError, RuntimeError) as error:  # array_record raises the latter
            raise UserError(
                f"{path} cannot be written ({error}); expected room and permission: make room or "
                "use another --data_dir; finished shards are kept."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _record_path(self, shard: Shard) -> Path:
        return self.progress / f"{shard.index:05d}.json"


@functools.cache
def make_features(class_names: tuple[str, ...]) -> Any:
    """The TFDS features of a set."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


def write_metadata(
    target: Target, splits: Mapping[str, tuple[Sequence[int], int]], description: str
) -> None:
    """Writes what makes TFDS know the set; dataset_info.json, which makes it whole, comes last.

    Args:
      target: the split just written.
      splits: (rows per shard, bytes) of every split of the set.
      description: for people.
    """
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=target.directory, dataset_name=target.name, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(lengths),
            num_bytes=num_bytes,
            filename_template=template.replace(split=split),
        )
        for split, (lengths, num_bytes) in splits.items()
    ]
    identity = tfds.core.DatasetIdentity(
        name=target.name,
        version=tfds.core.Version(VERSION),
        data_dir=str(target.directory),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=description,
        features=make_features(target.class_names),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.SplitDict(infos))
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=target.directory) as scratch:
        info.write_to_directory(scratch)
        for name in sorted(os.listdir(scratch), key=lambda name: name == "dataset_info.json"):
            os.replace(Path(scratch) / name, target.directory / name)
