"""Metrics: feature extractors by metric name, running moments and the Fréchet distance."""

import dataclasses
import importlib
from typing import TYPE_CHECKING

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.frechet import Moments, Stats, frechet_distance

if TYPE_CHECKING:  # jax and flax are imported only when an extractor is loaded.
    from shortcut_jax.metrics.classifier import Extractor

__all__ = ["METRICS", "Moments", "Stats", "check_metric", "frechet_distance", "load_extractor"]


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """What is known of a metric before its feature extractor is loaded.

    Attributes:
        module: has `load_extractor(name) -> Extractor`.
        image_shape: (H, W, C) of the images it measures.
    """

    module: str
    image_shape: tuple[int, int, int]


# None of these is an FID: that name is for Inception features and nothing else.
METRICS = {
    "fd_digits": MetricSpec("shortcut_jax.metrics.classifier", (8, 8, 1)),
    "fd_digits_mlp64": MetricSpec("shortcut_jax.metrics.classifier", (8, 8, 1)),
    "fd_fashion_mnist": MetricSpec("shortcut_jax.metrics.classifier", (32, 32, 1)),
}


def check_metric(name: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless `name` is a metric for images of shape (H, W, C)."""
    expected = _find(name).image_shape
    if image_shape != expected:
        raise UserError(
            f"The metric {name} measures images of shape {expected}, but those of this data set "
            f"are {image_shape}; choose another metric for it."
        )


def load_extractor(name: str) -> "Extractor":
    """Loads the feature extractor of a metric.

    Raises:
        UserError: unknown metric, or weights that do not match their record.
    """
    return importlib.import_module(_find(name).module).load_extractor(name)


def _find(name: str) -> MetricSpec:
    if name not in METRICS:
        raise UserError(
            f"There is no metric {name!r}; expected one of {', '.join(sorted(METRICS))}."
        )
    return METRICS[name]
