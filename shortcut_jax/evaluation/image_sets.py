"""Images to measure that no model here has made and no config names: a folder, a zip, an .npz."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.data.image_files import Entry, Files, Source
from shortcut_jax.data.sources import Dataset, Rows
from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of
from shortcut_jax.metrics import references

ARRAY = "arr_0"  # what numpy calls an array without a name, and ADM's samples are


def open_images(path: Path, channels: int = 3) -> Dataset:
    """Opens images of one size.

    Args:
      path: a folder or zip of image files, in which those of folders are found too; or an .npz with
        `arr_0`, [n, H, W, C], uint8 in 0..255 or float of 16, 32 or 64 bits in [-1, 1].
      channels: C; files are converted to RGB or to grey, arrays are not.

    Returns:
      The images, sorted by path or in the order of the array; their labels are 0.

    Raises:
      UserError: they cannot be read, or are not such images. Files of a folder are looked at when
        they are read, so that `rows` may raise it, too.
    """
    return (_from_npz if path.suffix == ".npz" else _from_files)(path, channels)


def _from_npz(path: Path, channels: int) -> Dataset:
    names = references.npz_names(path)
    if ARRAY not in names:
        raise UserError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}; expected images in {ARRAY}: "
            "give such a file."
        )
    # 50,000 images of 256x256 are 10 GB: they are in memory once.
    images = check_images(references.read_npz(path, [ARRAY])[ARRAY], f"{path}, {ARRAY}", channels)
    digest = sha256_of(path)
    return _dataset(path, images.shape[1:], len(images), digest, lambda i: {"image": images[i]})


def check_images(images: NDArray[Any], where: str, channels: int = 3) -> NDArray[Any]:
    """The images [n, H, W, channels] as they can be measured: uint8, or float32 in [-1, 1].

    Raises:
      UserError: another shape, dtype or range; `where` says whose.
    """
    expected = f"expected uint8 [n, H, W, {channels}] in 0..255, or float32 in [-1, 1]"
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        grey = channels == 3 and (images.ndim == 3 or images.shape[3:] == (1,))
        first = images.ndim == 4 and images.shape[1] == channels
        fix = (
            "grey images are to be repeated into three channels, if that is meant" if grey
            else "channels go last" if first
            else "mend the array"
        )  # fmt: skip
        raise UserError(f"{where} has shape {images.shape}; {expected}: {fix}.")
    if images.dtype == np.uint8:
        return images
    if images.dtype not in (np.float32, np.float16, np.float64):
        raise UserError(f"{where} is of dtype {images.dtype}; {expected}: convert it.")
    if not np.isfinite(images).all():
        raise UserError(f"{where} has NaN or infinite pixels; {expected}: find out what made them.")
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1 or low >= 0:
        fix = (
            "it seems to be in 0..255: round it and convert it to uint8" if high > 2 and low >= 0
            else "it seems to be in [0, 1]: take 2 x - 1" if low >= 0
            else "clip it, if that is meant"
        )  # fmt: skip
        raise UserError(f"{where} is float and in [{low:.4g}, {high:.4g}]; {expected}: {fix}.")
    return images.astype(np.float32, copy=False)


def _from_files(path: Path, channels: int) -> Dataset:
    if not path.exists():
        raise UserError(
            f"{path} does not exist; expected a folder or zip of images, or an .npz: mend the path."
        )
    source = Source(path)
    try:
        entries, _ = source.images()
    except UserError as error:
        raise UserError(str(error).replace("--source=", "")) from error
    shape = _decode(path, entries[0], source.open(), channels).shape

    def read(indices: NDArray[Any]) -> Rows:
        images = np.empty((len(indices), *shape), np.uint8)
        files = source.open()
        for row, index in enumerate(indices):
            entry = entries[int(index)]
            image = _decode(path, entry, files, channels)
            if image.shape != shape:
                raise UserError(
                    f"{path} holds images of several sizes: {entries[0].path} is "
                    f"{shape[1]}x{shape[0]}, {entry.path} {image.shape[1]}x{image.shape[0]}; "
                    "expected one size: crop them as your data was, for example with "
                    "shortcut_jax.prepare."
                )
            images[row] = image
        return {"image": images}

    listing = [[entry.path, entry.size, entry.stamp] for entry in entries]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return _dataset(path, shape, len(entries), digest, read)


def _decode(path: Path, entry: Entry, files: Files, channels: int) -> NDArray[np.uint8]:
    from PIL import Image

    # A grey photograph among coloured ones is one of them, as every other tool has it.
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        image = np.asarray(Image.open(io.BytesIO(files.read(entry.path))).convert(mode))
        return image.reshape(*image.shape[:2], channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: {entry.path} cannot be decoded ({' '.join(str(error).split())}); expected an "
            "image: mend it or take it out."
        ) from error


def _dataset(path: Path, shape: Any, size: int, digest: str, read: Any) -> Dataset:
    return Dataset(
        name=path.name,
        split="",
        image_shape=tuple(shape),
        num_classes=1,
        size=size,
        fingerprint=digest[:16],
        read=read,
    )
