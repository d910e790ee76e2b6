"""Samples as files: one .npz as ADM's evaluator reads it, or a folder of PNG files.

Samples are written as they are drawn and never all in memory; a killed pass goes on in the same
files, another pass starts them anew.
"""

import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.data.image_files import SUFFIXES
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation.grid import Cell
from shortcut_jax.evaluation.partial import digest_of
from shortcut_jax.files import replacing, write_atomically
from shortcut_jax.metrics.protocols import quantise


class Sink(Protocol):
    """Takes the samples of one pass.

    Attributes:
      path: of the file or folder.
      resumes: whether what a killed pass for the same samples has written is there.
    """

    path: Path
    resumes: bool

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """The samples `first`, `first` + 1 ..., [n, H, W, C] about in [-1, 1], and labels [n]."""

    def close(self) -> None:
        """All samples have come."""

    def stamp(self) -> int:
        """What tells the whole from what takes its place later; 0 while it is not there."""


# What takes the samples of a cell, of which the mapping says all that decides them, JSON.
Sinks = Callable[[Cell, Mapping[str, Any]], Sink]


class _Parts:
    """Arrays that a pass fills, in a folder that says which pass it is.

    Args:
      folder: for the arrays; whatever is in it is replaced, but for those of the same pass.
      total: rows of each array.
      identity: what decides the rows, JSON.

    Attributes:
      resumes: whether the arrays of the same pass were there.
    """

    def __init__(self, folder: Path, total: int, identity: Mapping[str, Any]) -> None:
        self._folder, self._total = folder, total
        # Written after the arrays and removed before them: they are there if it is.
        self._pass, self._digest = folder / "pass", digest_of({"total": total, **identity})
        self.resumes = self._begun()

    def file(self, name: str) -> Path:
        """The .npy of an array."""
        return self._folder / f"{name}.npy"

    def write(self, first: int, **arrays: NDArray[Any]) -> None:
        """The rows `first`, `first` + 1 ... of each array."""
        if not self._begun():
            self._begin(arrays)
        for name, rows in arrays.items():
            array = np.lib.format.open_memmap(self.file(name), mode="r+")
            array[first : first + len(rows)] = rows

    def remove(self) -> None:
        """Removes the folder."""
        self._pass.unlink(missing_ok=True)
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _begun(self) -> bool:
        return self._pass.exists() and self._pass.read_text() == self._digest

    def _begin(self, like: Mapping[str, NDArray[Any]]) -> None:
        self.remove()
        self._folder.mkdir(parents=True)
        for name, rows in like.items():
            shape = (self._total, *rows.shape[1:])
            np.lib.format.open_memmap(self.file(name), mode="w+", dtype=rows.dtype, shape=shape)
        write_atomically(self._pass, self._digest.encode())


class Npz:
    """An .npz with arr_0, images [total, H, W, C], and arr_1, labels [total] int32.

    Args:
      path: of the file; beside it lies NAME.npz.parts until it is whole.
      total: samples that will come.
      rule: key of `protocols.QUANTISE`; images are uint8, or float32 in [-1, 1] for "none".
      identity: what decides the samples, JSON.
    """

    def __init__(self, path: Path, total: int, rule: str, identity: Mapping[str, Any]) -> None:
        self.path, self._rule = path, rule
        folder = path.with_name(f"{path.name}.parts")
        self._parts = _Parts(folder, total, {"rule": rule, **identity})
        self.resumes = self._parts.resumes

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """See `Sink`."""
        levels = images if self._rule == "none" else quantise(self._rule, images)
        self._parts.write(first, arr_0=levels, arr_1=labels)

    def close(self) -> None:
        """Puts the parts together, whole or not at all."""
        with replacing(self.path) as whole, zipfile.ZipFile(whole, "w") as archive:
            for file in map(self._parts.file, ("arr_0", "arr_1")):
                entry = zipfile.ZipInfo(
                    file.name
                )  # without a time: the same samples, the same file
                with file.open("rb") as part, archive.open(entry, "w", force_zip64=True) as copy:
                    shutil.copyfileobj(part, copy)
        self._parts.remove()

    def stamp(self) -> int:
        """See `Sink`."""
        return self.path.stat().st_mtime_ns if self.path.exists() else 0


class Pngs:
    """A folder with 000000.png, 000001.png ... and labels.csv (lines path,label).

    Files of the same names that are in the folder stay as they are until all samples have come.

    Args:
      path: of the folder; beside it lies NAME.parts until it is whole.
      total: samples that will come.
      rule: key of `protocols.QUANTISE`; "none" is rounded, as a PNG holds whole grey levels.
      identity: what decides the samples, JSON.
    """

    def __init__(self, path: Path, total: int, rule: str, identity: Mapping[str, Any]) -> None:
        self.path, self._rule = path, "round" if rule == "none" else rule
        self._table, self._total = path / "labels.csv", total
        self._folder = path.with_name(f"{path.name}.parts")
        self._parts = _Parts(self._folder, total, {"rule": self._rule, **identity})
        self.resumes = self._parts.resumes

    def write(self, first: int, images: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
        """See `Sink`."""
        from PIL import Image

        self._parts.write(first, labels=labels)  # first, as it removes what another pass has left
        for i, image in enumerate(quantise(self._rule, images), first):
            grey = image.shape[-1] == 1
            Image.fromarray(image[..., 0] if grey else image).save(self._folder / _name(i))

    def close(self) -> None:
        """Moves the images to their folder and writes the labels, without which it is not whole.

        Nothing is drawn meanwhile: it takes moments. If it is killed, it can be called again.
        """
        labels = np.load(self._parts.file("labels"), allow_pickle=False)
        self.path.mkdir(parents=True, exist_ok=True)
        self._table.unlink(missing_ok=True)  # those of the images that are replaced
        for name in map(_name, range(len(labels))):
            if (self._folder / name).exists():  # else it was moved before
                shutil.move(self._folder / name, self.path / name)
        lines = ["path,label", *(f"{_name(i)},{label}" for i, label in enumerate(labels)), ""]
        write_atomically(self._table, "\n".join(lines).encode())
        self._parts.remove()

    def stamp(self) -> int:
        """See `Sink`."""
        files = [self._table, *(self.path / _name(i) for i in range(self._total))]
        return self._table.stat().st_mtime_ns if all(map(Path.exists, files)) else 0


def check_folder(path: Path, total: int) -> None:
    """Raises UserError if a folder holds images that `Pngs` would leave among its `total`."""
    found = (file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
    others = {str(file.relative_to(path)) for file in found} - set(map(_name, range(total)))
    if others:
        raise UserError(
            f"{path} holds images other than the {total} that would be written ({len(others)}, the "
            f"first {min(others)}); expected none, as they would be measured, too: give another "
            "folder or move them away."
        )


def _name(i: int) -> str:
    return f"{i:06}.png"
