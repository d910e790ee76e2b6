"""The weights of the FID's Inception-v3; see `network_weights`."""

import math
from collections.abc import Mapping

from shortcut_jax.metrics.network_weights import RANDOM, Network, Weights, kernel_bounds

__all__ = ["NAME", "NETWORK", "RANDOM", "SHA256", "Weights", "check", "load", "random_array"]


def _bounds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Running statistics are far from 0 and 1, so that a network which ignores them differs."""
    if math.prod(shape[1:]) > 1:
        return kernel_bounds(shape)
    return (0.5, 1.5) if name.endswith(("running_var", "bn.weight")) else (-0.5, 0.5)


NETWORK = Network(
    key="inception",
    published="inception-2015-12-05",
    what="the FID's network",
    metric="fid",
    bounds=_bounds,
    surplus=".*",  # counts of batches
)
NAME, SHA256 = NETWORK.published, NETWORK.sha256
random_array = NETWORK.random_array


def check(inception_weights: str = "", inception_sha256: str = "", **_: str) -> None:
    """Refuses missing and other files; see `Network.check`."""
    NETWORK.check(inception_weights, inception_sha256)


def load(
    shapes: Mapping[str, tuple[int, ...]], inception_weights: str = "", inception_sha256: str = ""
) -> Weights:
    """Weights that `check` accepts; see `Network.load`."""
    return NETWORK.load(shapes, inception_weights, inception_sha256)
