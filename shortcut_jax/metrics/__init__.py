"""Metrics: feature extractors by metric name, running moments and the Fréchet distance."""

import importlib
from typing import TYPE_CHECKING

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.frechet import Moments, Stats, frechet_distance

if TYPE_CHECKING:
    from shortcut_jax.metrics.classifier import Extractor

__all__ = ["EXTRACTORS", "Moments", "Stats", "frechet_distance", "load_extractor"]

# Metric name -> module whose `load_extractor(name)` makes its features. None of these is an FID:
# that name is for Inception features and nothing else.
EXTRACTORS = {
    "fd_digits": "shortcut_jax.metrics.classifier",
    "fd_digits_mlp64": "shortcut_jax.metrics.classifier",
    "fd_fashion_mnist": "shortcut_jax.metrics.classifier",
}


def load_extractor(name: str) -> "Extractor":
    """The feature extractor of a metric; imports jax and flax only now.

    Raises UserError for an unknown name or weights that do not match their record.
    """
    if name not in EXTRACTORS:
        raise UserError(f"metric={name!r} is unknown: use one of {', '.join(sorted(EXTRACTORS))}.")
    return importlib.import_module(EXTRACTORS[name]).load_extractor(name)
