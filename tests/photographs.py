"""A small set of real photographs: parts of the two that scikit-learn ships."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from shortcut_jax.data import image_files, preparing

PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def write_folder(folder: Path, per_class: int = 10, side: int = 72) -> Path:
    """One folder per photograph with `per_class` parts of it, as JPEG, wider than high."""
    for name in PHOTOGRAPHS:
        photograph = load_sample_image(name)
        inside = folder / Path(name).stem
        inside.mkdir(parents=True)
        for i in range(per_class):
            top, left = 7 * i, 31 * i
            part = photograph[top : top + side, left : left + side + 20]
            Image.fromarray(np.ascontiguousarray(part)).save(inside / f"{i:02d}.jpg", quality=95)
    return folder


def prepare(folder: Path) -> Path:
    """The same 20 photographs as the data set "photographs" in the data directory `folder`."""
    source = image_files.Source(write_folder(folder / "jpegs"), "")
    preparing.prepare(
        preparing.Request(
            source=source, name="photographs", split="train", data_dir=folder, labels="folders",
            counts=(20,), workers=0, skip_corrupt=False,
        )
    )  # fmt: skip
    return folder
