"""What every feature extractor is: images in, float32 features out, whatever the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.protocols import Protocol, quantise

if TYPE_CHECKING:  # only extractors that are loaded need jax.
    import jax

# Images a metric measures: (H, W, C), None for any size.
ImageShape = tuple[int | None, int | None, int]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A trained network whose activations are the features.

    Attributes:
        name: of the network, a key of `metrics.EXTRACTORS`.
        weights: "" for the published ones, which alone give their names to numbers; else what to
            call them.
        protocol: what happens to images before the network.
        image_shape: (H, W, C) of the images it takes, None for any.
        feature_dim: number of features per image.
        sha256: hash of the weight file; belongs to every number made with these features.
        info: the record beside the weights: where they come from and how good they are.
        batch: images per call of `forward`. Fixed, so that the same program computes every image.
        forward: compiled grey levels [batch, H, W, C], uint8 or float32 as the protocol quantises
            -> {"features": [batch, feature_dim], "logits": [batch, num_classes], ...}.
    """

    name: str
    weights: str
    protocol: Protocol
    image_shape: ImageShape
    feature_dim: int
    sha256: str
    info: Mapping[str, Any]
    batch: int
    forward: Callable[[NDArray[Any]], Mapping[str, jax.Array]] = dataclasses.field(repr=False)

    def outputs(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """All that `forward` gives, for any number of images.

        Args:
            images: [n, H, W, C], uint8 grey levels, or float32 samples about in [-1, 1], which the
                protocol quantises.

        Returns:
            Name -> float32 [n, ...]. Row i depends on image i alone.

        Raises:
            UserError: another dtype or shape, or a sample is not finite.
        """
        return self.begin(images)()

    def begin(self, images: NDArray[Any]) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """As `outputs`, which are what the function returned here waits for and gives."""
        if not fits(images.shape[1:], self.image_shape):
            raise UserError(
                f"{self.name} takes images of shape (n, {shape_text(self.image_shape)[1:]}, got "
                f"{images.shape}: choose a metric for such images."
            )
        levels = quantise(self.protocol.quantise, images)
        parts = []
        # At least one batch, so that no images give arrays of shape (0, d).
        for start in range(0, max(len(levels), 1), self.batch):
            some = levels[start : start + self.batch]
            padded = np.zeros((self.batch, *levels.shape[1:]), levels.dtype)
            padded[: len(some)] = some
            parts.append((self.forward(padded), len(some)))

        def finish() -> dict[str, NDArray[np.float32]]:
            found = [{k: np.asarray(v)[:n] for k, v in part.items()} for part, n in parts]
            return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

        return finish


def fits(shape: tuple[int, ...], expected: ImageShape) -> bool:
    """Whether images of `shape` are such as `expected` says."""
    return len(shape) == 3 and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def shape_text(shape: ImageShape) -> str:
    """(None, None, 3) -> "(any, any, 3)"."""
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"
