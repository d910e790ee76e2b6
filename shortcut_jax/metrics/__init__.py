"""Metrics: feature extractors by metric name, running moments and the Fréchet distance."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.extractor import ImageShape, fits, shape_text
from shortcut_jax.metrics.frechet import Moments, Stats, frechet_distance

if TYPE_CHECKING:
    from shortcut_jax.metrics.extractor import Extractor

__all__ = [
    "METRICS",
    "Moments",
    "Stats",
    "check_count",
    "check_files",
    "check_metric",
    "frechet_distance",
    "label",
    "load_extractor",
    "options",
]


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """What is known of a metric before its feature extractor is loaded.

    Attributes:
        module: has `load_extractor(name, **options) -> Extractor`; jax and flax are imported with
            it.
        image_shape: (H, W, C) of the images it measures, None for any.
        options: keys of the config's section eval that `load_extractor` takes.
        files: has `check(**options)`, which refuses missing files without importing jax.
        min_samples: fewer are refused, unless `eval.few_samples` is set.
        full_samples: how many its name stands for: a distance of others is called "fid_5000". None
            if the name says nothing about that.
    """

    module: str
    image_shape: ImageShape
    options: tuple[str, ...] = ()
    files: str = ""
    min_samples: int = 2
    full_samples: int | None = None


_CLASSIFIER = "shortcut_jax.metrics.classifier"

# FID is the name of Inception features and of nothing else.
METRICS = {
    "fd_digits": MetricSpec(_CLASSIFIER, (8, 8, 1)),
    "fd_digits_mlp64": MetricSpec(_CLASSIFIER, (8, 8, 1)),
    "fd_fashion_mnist": MetricSpec(_CLASSIFIER, (32, 32, 1)),
    "fid": MetricSpec(
        "shortcut_jax.metrics.fid",
        (None, None, 3),
        options=("inception_weights", "inception_sha256", "inception_protocol"),
        files="shortcut_jax.metrics.inception_weights",
        min_samples=2048,  # features: the covariance of fewer is singular
        full_samples=50_000,
    ),
}


def check_metric(name: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless `name` is a metric for images of shape (H, W, C)."""
    expected = _find(name).image_shape
    if not fits(image_shape, expected):
        raise UserError(
            f"The metric {name} measures images of shape {shape_text(expected)}, but those of this "
            f"data set are {image_shape}; choose another metric for it."
        )


def check_count(name: str, count: int, what: str, section: Mapping[str, Any]) -> None:
    """Raises UserError if `count` images are too few for a metric.

    Args:
        name: key of METRICS.
        count: of the images.
        what: says which images they are, for the sentence.
        section: eval of the config, whose `few_samples` allows any number.
    """
    at_least = _find(name).min_samples
    if count < at_least and not ("few_samples" in section and section["few_samples"]):
        raise UserError(
            f"{what} is too few for the metric {name}, whose {at_least:,} features then have a "
            f"singular covariance and a distance that is mostly bias; expected {at_least:,} or "
            "more: raise it, or set eval.few_samples=True in the config file."
        )


def options(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_extractor` takes from the config's section eval."""
    return {key: section[key] for key in _find(name).options if key in section}


def check_files(name: str, **options: Any) -> None:
    """Raises UserError if a file that the metric needs is missing or another one."""
    if _find(name).files:
        importlib.import_module(_find(name).files).check(**options)


def load_extractor(name: str, **options: Any) -> "Extractor":
    """Loads the feature extractor of a metric.

    Args:
        name: key of METRICS.
        **options: those of the metric; see `options`.

    Raises:
        UserError: unknown metric, or weights that are missing or do not match their record.
    """
    return importlib.import_module(_find(name).module).load_extractor(name, **options)


def label(name: str, extractor: "Extractor", num_samples: int) -> str:
    """What a distance of so many samples is called: "fid", "fid_5000", "fd_inception_random_50"."""
    full = _find(name).full_samples
    if full is None:
        return name
    return extractor.name if num_samples == full else f"{extractor.name}_{num_samples}"


def _find(name: str) -> MetricSpec:
    if name not in METRICS:
        raise UserError(
            f"There is no metric {name!r}; expected one of {', '.join(sorted(METRICS))}."
        )
    return METRICS[name]
