"""Samples as files: one .npz as ADM's evaluator reads it, or a folder of PNG files.

Samples are written as they are drawn and never all in memory; a killed pass goes on in the same
files.
"""

import shutil
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.files import replacing, write_atomically
from shortcut_jax.metrics.protocols import quantise


class Sink(Protocol):
    """Takes the samples of one pass.

    Attributes:
      path: of the file or folder.
      resumes: whether what an earlier pass has written is there.
    """

    path: Path
    resumes: bool

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """The samples `first`, `first` + 1 ..., [n, H, W, C] about in [-1, 1], and labels [n]."""

    def close(self) -> None:
        """All samples have come."""


class Npz:
    """An .npz with arr_0, images [total, H, W, C], and arr_1, labels [total] int32.

    Args:
      path: of the file; beside it lies NAME.npz.parts until it is whole.
      total: samples that will come.
      rule: key of `protocols.QUANTISE`; images are uint8, or float32 in [-1, 1] for "none".
    """

    def __init__(self, path: Path, total: int, rule: str) -> None:
        self.path, self._total, self._rule = path, total, rule
        self._parts = path.with_name(f"{path.name}.parts")
        self._files = {name: self._parts / f"{name}.npy" for name in ("arr_0", "arr_1")}
        self.resumes = all(file.exists() for file in self._files.values())

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """See `Sink`."""
        levels = images if self._rule == "none" else quantise(self._rule, images)
        for name, rows in (("arr_0", levels), ("arr_1", labels)):
            _rows_of(self._files[name], self._total, rows)[first : first + len(rows)] = rows

    def close(self) -> None:
        """Puts the parts together, whole or not at all."""
        with replacing(self.path) as whole, zipfile.ZipFile(whole, "w") as archive:
            for file in self._files.values():
                entry = zipfile.ZipInfo(
                    file.name
                )  # without a time: the same samples, the same file
                with file.open("rb") as part, archive.open(entry, "w", force_zip64=True) as copy:
                    shutil.copyfileobj(part, copy)
        shutil.rmtree(self._parts)


class Pngs:
    """A folder with 000000.png, 000001.png ... and labels.csv (lines path,label).

    Args:
      path: of the folder.
      total: samples that will come.
      rule: key of `protocols.QUANTISE`; "none" is rounded, as a PNG holds whole grey levels.
    """

    def __init__(self, path: Path, total: int, rule: str) -> None:
        self.path, self._total, self._rule = path, total, "round" if rule == "none" else rule
        self._labels = path / "labels.npy"  # until all are there
        self.resumes = self._labels.exists()

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """See `Sink`."""
        from PIL import Image

        self.path.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(quantise(self._rule, images), first):
            grey = image.shape[-1] == 1
            Image.fromarray(image[..., 0] if grey else image).save(self.path / f"{i:06}.png")
        _rows_of(self._labels, self._total, labels)[first : first + len(labels)] = labels

    def close(self) -> None:
        """Writes the labels."""
        labels = np.load(self._labels, allow_pickle=False)
        lines = ["path,label", *(f"{i:06}.png,{label}" for i, label in enumerate(labels)), ""]
        write_atomically(self.path / "labels.csv", "\n".join(lines).encode())
        self._labels.unlink()


def _rows_of(file: Path, total: int, rows: NDArray) -> np.memmap:
    """An .npy of `total` rows like these, to be written to."""
    if file.exists():
        return np.lib.format.open_memmap(file, mode="r+")
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (total, *rows.shape[1:])
    return np.lib.format.open_memmap(file, mode="w+", dtype=rows.dtype, shape=shape)
