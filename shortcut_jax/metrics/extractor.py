"""What every feature extractor is: uint8 images in, float32 features out, whatever the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.errors import UserError

if TYPE_CHECKING:  # only extractors that are loaded need jax.
    import jax

# Images a metric measures: (H, W, C), None for any size.
ImageShape = tuple[int | None, int | None, int]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A trained network whose activations are the features.

    Attributes:
        name: of its Fréchet distance, for example "fd_digits"; "fid" for one network only.
        image_shape: (H, W, C) of the images it takes, None for any.
        feature_dim: number of features per image.
        sha256: hash of the weight file; belongs to every number made with these features.
        info: the record beside the weights: where they come from and how good they are.
        batch: images per call of `forward`. Fixed, so that the same program computes every image.
        forward: compiled uint8 [batch, H, W, C] -> {"features": [batch, feature_dim],
            "logits": [batch, num_classes], ...}.
        resize: what happens to an image before the network, for the record of a number.
    """

    name: str
    image_shape: ImageShape
    feature_dim: int
    sha256: str
    info: Mapping[str, Any]
    batch: int
    forward: Callable[[NDArray[np.uint8]], Mapping[str, jax.Array]] = dataclasses.field(repr=False)
    resize: str = "none"

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 images [n, H, W, C] -> float32 features [n, d].

        Row i depends on image i alone. Raises UserError for another dtype or shape.
        """
        return self.outputs(images)["features"]

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 images [n, H, W, C] -> float32 class logits [n, num_classes]; as `features`."""
        return self.outputs(images)["logits"]

    def outputs(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """All that `forward` gives, for any number of images; as `features`."""
        if images.dtype != np.uint8 or not fits(images.shape[1:], self.image_shape):
            raise UserError(
                f"metric={self.name!r} takes uint8 images of shape (n, "
                f"{shape_text(self.image_shape)[1:]}, got {images.dtype} {images.shape}: "
                "choose the metric of this data set, or quantise the images to uint8."
            )
        parts = []
        # At least one batch, so that no images give arrays of shape (0, d).
        for start in range(0, max(len(images), 1), self.batch):
            some = images[start : start + self.batch]
            padded = np.zeros((self.batch, *images.shape[1:]), np.uint8)
            padded[: len(some)] = some
            parts.append({k: np.asarray(v)[: len(some)] for k, v in self.forward(padded).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fits(shape: tuple[int, ...], expected: ImageShape) -> bool:
    """Whether images of `shape` are such as `expected` says."""
    return len(shape) == 3 and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def shape_text(shape: ImageShape) -> str:
    """(None, None, 3) -> "(any, any, 3)"."""
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"
