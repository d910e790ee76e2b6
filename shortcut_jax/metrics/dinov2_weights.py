"""The weights of DINOv2 ViT-L/14 (the one without registers); see `network_weights`."""

from collections.abc import Mapping

from shortcut_jax.metrics.network_weights import RANDOM, Network, Weights, kernel_bounds

__all__ = ["NETWORK", "RANDOM", "Weights", "check", "load"]


def _bounds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Gains are around 1; embeddings as large as what they are added to."""
    if name.endswith("weight") and len(shape) > 1:
        return kernel_bounds(shape)
    gain = name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight"))
    return (0.5, 1.5) if gain else (-0.5, 0.5)


NETWORK = Network(
    key="dinov2",
    published="dinov2-vitl14",
    what="the network of FD-DINOv2",
    metric="fd_dinov2",
    bounds=_bounds,
    # Of its training. A file with register tokens is that of another network.
    surplus="mask_token",
)


def check(dinov2_weights: str = "", dinov2_sha256: str = "", **_: str) -> None:
    """Refuses missing and other files; see `Network.check`."""
    NETWORK.check(dinov2_weights, dinov2_sha256)


def load(
    shapes: Mapping[str, tuple[int, ...]], dinov2_weights: str = "", dinov2_sha256: str = ""
) -> Weights:
    """Weights that `check` accepts; see `Network.load`."""
    return NETWORK.load(shapes, dinov2_weights, dinov2_sha256)
