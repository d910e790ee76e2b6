"""Real images for the tests of image sets: cuts of the photographs that scikit-learn ships."""

import functools
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_image

    return tuple(load_sample_image(name) for name in ("china.jpg", "flower.jpg"))


def cut(seed: int) -> np.ndarray:
    """uint8 [H, W, 3], sides of 40 to 89 pixels, different for every seed."""
    rng = np.random.default_rng(seed)
    photograph = _photographs()[seed % 2]
    height, width = rng.integers(40, 90, 2)
    top, left = (rng.integers(0, side - 90) for side in photograph.shape[:2])
    return photograph[top : top + height, left : left + width]


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """A cut as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(cut(seed)).save(buffer, kind)
    return buffer.getvalue()


def make_tfds(
    data_dir: Path,
    name: str,
    version: str,
    features: dict[str, tfds.features.FeatureConnector],
    splits: dict[str, list[dict]],
) -> Path:
    """Prepares a set as TFDS does; returns its folder."""
    with tfds.core.registered.skip_registration():

        class Made(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            code_path = None

            def _info(self):
                made = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=made, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: enumerate(rows) for split, rows in splits.items()}

            def _generate_examples(self):  # the base class asks for it
                raise AssertionError

    Made.name = name
    builder = Made(data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)
