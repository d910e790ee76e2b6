"""Latents on disk: the moments of every image of a data set and of its mirror image.

A folder holds manifest.json, which says what the latents are, and for each SHARD_ROWS images one
ArrayRecord file with a .json that says how many rows it has and what its bytes are. Record 2i is
image i of the shard, record 2i + 1 its mirror: moments [h, w, 2c] (mean and log-variance of the
posterior, not scaled) and the label. Shards are independent, so any number of processes may make
them and a killed one loses no more than the shard it was at.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from shortcut_jax import manifest
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset, Rows
from shortcut_jax.errors import UserError
from shortcut_jax.files import read_json, sha256_of
from shortcut_jax.spaces import Latents

SHARD_ROWS = 4096
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(jnp.bfloat16)}
FIX = "Use the config they were made with, or another folder"

# encode(images uint8 [n, H, W, 3], and mirrored) -> moments float32 [n, h, w, 2c] of each
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def describe(section: Any, autoencoder: Any, sha256: str) -> dict[str, Any]:
    """What latents must be for a config to train on them: the part of a manifest it decides.

    Args:
      section: `config.data`, of data set "images".
      autoencoder: `config.autoencoder`.
      sha256: of the autoencoder's weights.
    """
    return {
        **{key: section[key] for key in ("builder", "split", "image_size", "crop", "num_classes")},
        "autoencoder": autoencoder["kind"],
        "autoencoder_sha256": sha256,
        "scale": autoencoder["scale"],
    }


def make(
    folder: Path,
    images: Dataset,
    encode: Encode,
    contents: dict[str, Any],
    *,
    moments_shape: tuple[int, int, int],
    dtype: str = "float16",
    batch_size: int = 64,
    shard_rows: int | None = None,
    task: tuple[int, int] = (0, 1),
    num_workers: int = 0,
) -> int:
    """Makes the shards that are missing, of those that are this task's.

    Args:
      folder: gets the files.
      images: the data set.
      encode: makes moments; called with `batch_size` images, fewer at the end of a shard.
      contents: from `describe`.
      moments_shape: (h, w, 2c).
      dtype: key of DTYPES, what moments are stored as.
      shard_rows: images in a shard; SHARD_ROWS by default.
      task: (k, n): makes every n-th shard from the k-th.
      num_workers: processes that read and decode; 0 for threads.

    Returns:
      Number of shards that other tasks have still to make.

    Raises:
      UserError: the folder holds other latents, cannot be written, or an image has moments that
        `dtype` cannot hold.
    """
    shard_rows = shard_rows or SHARD_ROWS
    whole = {
        **contents,
        "images": images.fingerprint,
        "count": images.size,
        "moments_shape": list(moments_shape),
        "dtype": dtype,
        "shard_rows": shard_rows,
    }
    manifest.claim(folder, whole, "latents", "*.arrayrecord", FIX)
    shards = range(-(-images.size // shard_rows))
    mine = shards[task[0] :: task[1]]
    with pipeline.reading(images, num_workers) as read:
        for done, shard in enumerate(mine):
            if not _sidecar(folder, shard).exists():
                first, last = shard * shard_rows, min((shard + 1) * shard_rows, images.size)
                batches = pipeline.in_order(read, first, last, batch_size, max(2, num_workers))
                records = _encoded(batches, encode, _record(moments_shape, dtype), first)
                _write_shard(folder, shard, records)
            logging.info("Latents: %d of %d shards.", done + 1, len(mine))
    return sum(not _sidecar(folder, shard).exists() for shard in shards)


def encoder(space: Latents, batch_size: int) -> Encode:
    """Encodes up to `batch_size` images and their mirrors, with one compiled program."""
    size = -(-batch_size // space.mesh.size) * space.mesh.size

    def moments(images: np.ndarray) -> np.ndarray:
        filled = np.resize(images, (size, *images.shape[1:]))  # cut again below
        return np.asarray(space.encode(jnp.asarray(pipeline.to_float(filled))))[: len(images)]

    return lambda images: (moments(images), moments(images[:, :, ::-1]))


def open_cache(folder: Path, wanted: dict[str, Any], num_classes: int) -> Dataset:
    """Opens latents for training, whose mirror images are rows of their own.

    Args:
      folder: made by `make`, by all its tasks.
      wanted: from `describe`.

    Returns:
      A data set whose images are moments [h, w, 2c] as they are stored.

    Raises:
      UserError: there are none, they are others, or not all are there.
    """
    found = _read_manifest(folder)
    manifest.refuse_differences(folder, found, wanted, "latents", FIX)
    paths = _finished_shards(folder, found)
    record = _record(tuple(found["moments_shape"]), found["dtype"])

    return Dataset(
        name=f"latents of {found['builder']}",
        split=found["split"],
        image_shape=tuple(found["moments_shape"]),
        num_classes=num_classes,
        size=found["count"],
        fingerprint=manifest.digest(found),
        read=_Reader([str(path) for path in paths], record, found["count"], found["shard_rows"]),
        has_mirrors=True,
        holds="moments",
        dtype=record["moments"].base,
    )


def verify(folder: Path) -> int:
    """Reads every byte of a cache and compares it with what was written.

    Returns:
      The number of images.

    Raises:
      UserError: a shard is missing or its bytes are others.
    """
    found = _read_manifest(folder)
    for shard, path in enumerate(_finished_shards(folder, found)):
        recorded = _read_sidecar(folder, shard)["sha256"]
        if sha256_of(path) != recorded:
            raise UserError(
                f"{path} is damaged (sha256 {sha256_of(path)}, when written {recorded}); expected "
                f"what was written: remove it and {_sidecar(folder, shard).name}, and run "
                "cache_latents again, which makes that shard anew."
            )
        logging.info("Verified %s.", path.name)
    return found["count"]


class _Reader:
    """Reads moments and labels by index; can be sent to another process.

    The files are read here, not through `ArrayRecordDataSource`: that starts a pool of threads for
    every batch, which costs as much as reading where a batch is spread over hundreds of shards.
    """

    def __init__(self, paths: Sequence[str], record: np.dtype, count: int, shard_rows: int):
        self._paths, self._record = list(paths), record
        self._count, self._shard_rows = count, shard_rows
        self._files: dict[int, Any] = {}

    def __call__(self, indices: np.ndarray) -> Rows:
        mirrored, rows = np.divmod(indices, self._count)
        shards, positions = np.divmod(2 * rows + mirrored, 2 * self._shard_rows)
        order = np.argsort(shards, kind="stable")  # each file is asked once
        content = []
        for shard, here in itertools.groupby(order.tolist(), key=shards.__getitem__):
            content += self._file(int(shard)).read(positions[list(here)].tolist())
        found = np.frombuffer(b"".join(content), self._record)
        back = np.argsort(order)
        return {"image": found["moments"][back], "label": found["label"][back]}

    def _file(self, shard: int) -> Any:
        """The opened file; threads may share it, and at worst open one twice."""
        if shard not in self._files:
            from array_record.python.array_record_module import ArrayRecordReader

            self._files[shard] = ArrayRecordReader(
                self._paths[shard], "readahead_buffer_size:0", file_reader_buffer_size=2**15
            )
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _record(moments_shape: tuple[int, ...], dtype: str) -> np.dtype:
    return np.dtype([("moments", DTYPES[dtype], moments_shape), ("label", "<i4")])


def _write_shard(folder: Path, shard: int, records: Iterator[np.ndarray]) -> None:
    from array_record.python import array_record_module

    path, count = _shard_path(folder, shard), 0
    unfinished = path.with_suffix(".unfinished")
    try:
        # Moments do not compress, and one record in a group is what random access reads fastest.
        writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        for some in records:
            count += len(some)
            for record in some:
                writer.write(record.tobytes())
        writer.close()
        size, sha256 = unfinished.stat().st_size, sha256_of(unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what ArrayRecord raises
        raise UserError(
            f"{path} cannot be written ({error}); expected room for it: make room or choose "
            "another folder; finished shards are kept."
        ) from error
    sidecar = {"rows": count // 2, "bytes": size, "sha256": sha256}
    manifest.write(_sidecar(folder, shard), json.dumps(sidecar).encode())


def _encoded(
    batches: Iterator[Rows], encode: Encode, record: np.dtype, first: int
) -> Iterator[np.ndarray]:
    """Records of image, mirror, image, mirror ... of batches of images, the first of index `first`.

    Raises:
      UserError: moments that the type of the records cannot hold.
    """
    for rows in batches:
        plain, mirrored = encode(rows["image"])
        found = np.empty((len(plain), 2), record)
        with np.errstate(over="ignore"):  # is looked for below
            found["moments"][:, 0], found["moments"][:, 1] = plain, mirrored
        found["label"] = rows["label"][:, None]
        finite = np.isfinite(found["moments"].astype(np.float32)).all(axis=(1, 2, 3, 4))
        if not finite.all():
            raise UserError(
                f"Image {first + int(np.argmin(finite))} has latents that "
                f"{record['moments'].base} cannot hold; expected finite ones: check "
                "autoencoder.weights, or store --dtype=bfloat16."
            )
        first += len(plain)
        yield found.reshape(-1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / manifest.NAME).is_file():
        raise UserError(
            f"data.latents={folder} holds no latents (no {manifest.NAME} to read); expected a "
            "folder made by python -m shortcut_jax.cache_latents: make it, or mend the path."
        )
    return manifest.read(folder, "latents")


def _finished_shards(folder: Path, found: dict[str, Any]) -> list[Path]:
    count, size = found["count"], found["shard_rows"]
    paths = []
    for shard in range(-(-count // size)):
        path, rows = _shard_path(folder, shard), min(size, count - shard * size)
        recorded = _read_sidecar(folder, shard)
        there = path.stat().st_size if path.exists() else 0
        if recorded["rows"] != rows or recorded["bytes"] != there:
            raise UserError(
                f"{path} is missing or not whole ({there:,} bytes, {recorded['bytes']:,} when "
                f"written); expected {rows} images in it: remove {_sidecar(folder, shard).name} if "
                "it is there, and run python -m shortcut_jax.cache_latents again."
            )
        paths.append(path)
    return paths


def _read_sidecar(folder: Path, shard: int) -> dict[str, Any]:
    path = _sidecar(folder, shard)
    return read_json(path, "the record of a shard") if path.exists() else {"rows": 0, "bytes": 0}


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.arrayrecord"


def _sidecar(folder: Path, shard: int) -> Path:
    return _shard_path(folder, shard).with_suffix(".json")
