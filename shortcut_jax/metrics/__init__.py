"""Metrics by name: which network's outputs they are computed from, and how.

A metric is a line in METRICS, a network that sees images a line in EXTRACTORS. What is measured in
one pass over the images is a `Gauge` (`shortcut_jax.metrics.gauges`).
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import values
from shortcut_jax.metrics.extractor import ImageShape, fits, shape_text
from shortcut_jax.metrics.frechet import Moments, Stats, frechet_distance
from shortcut_jax.metrics.protocols import DINOV2, INCEPTION, PLAIN, Protocol
from shortcut_jax.metrics.values import Value

if TYPE_CHECKING:
    from shortcut_jax.metrics.extractor import Extractor

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Moments",
    "Stats",
    "Value",
    "check_count",
    "check_files",
    "check_metric",
    "check_protocols",
    "find",
    "frechet_distance",
    "higher_is_better",
    "label",
    "load_extractor",
    "protocols_of",
]

FULL = 50_000  # samples that the plain name of a metric stands for


@dataclasses.dataclass(frozen=True)
class ExtractorSpec:
    """What is known of a network before it is loaded.

    Attributes:
        module: has `load_extractor(name, protocol, **options) -> Extractor`; jax and flax are
            imported with it.
        image_shape: (H, W, C) of the images it takes, None for any.
        protocols: those it may be used with, by name, the usual one first.
        options: keys of the config's section eval that `load_extractor` takes.
        files: module that has `check(**options)`, which refuses missing files without importing
            jax.
    """

    module: str
    image_shape: ImageShape
    protocols: Mapping[str, Protocol]
    options: tuple[str, ...] = ()
    files: str = ""


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """How a metric is computed.

    Attributes:
        extractor: key of EXTRACTORS.
        value: from the summaries of samples and reference, and the protocol.
        summary: key of `gauges.SUMMARIES`, what is kept of the outputs.
        output: of the extractor.
        other_name: what it is called with other weights than the published ones: the FID is a name
            of one network.
        needs_reference: whether the samples are compared with anything.
        higher_is_better: whether better samples have more of it; less of a distance is better.
        min_samples: fewer are refused, unless `eval.allow_small_n` is set.
        names_count: whether its name says how many samples if they are not `FULL`.
    """

    extractor: str
    value: Callable[..., Value] = values.frechet
    summary: str = "moments"
    output: str = "features"
    other_name: str = ""
    needs_reference: bool = True
    higher_is_better: bool = False
    min_samples: int = 2
    names_count: bool = True


def _classifier(image_shape: ImageShape) -> ExtractorSpec:
    return ExtractorSpec("shortcut_jax.metrics.classifier", image_shape, {PLAIN.name: PLAIN})


EXTRACTORS = {
    "fd_digits": _classifier((8, 8, 1)),
    "fd_digits_mlp64": _classifier((8, 8, 1)),
    "fd_fashion_mnist": _classifier((32, 32, 1)),
    "inception": ExtractorSpec(
        "shortcut_jax.metrics.fid",
        (None, None, 3),
        INCEPTION,
        options=("inception_weights", "inception_sha256"),
        files="shortcut_jax.metrics.inception_weights",
    ),
    "dinov2": ExtractorSpec(
        "shortcut_jax.metrics.dinov2",
        (None, None, 3),
        DINOV2,
        options=("dinov2_weights", "dinov2_sha256"),
        files="shortcut_jax.metrics.dinov2_weights",
    ),
}

METRICS = {
    "fd_digits": MetricSpec("fd_digits", names_count=False),
    "fd_digits_mlp64": MetricSpec("fd_digits_mlp64", names_count=False),
    "fd_fashion_mnist": MetricSpec("fd_fashion_mnist", names_count=False),
    # The covariance of fewer samples than features is singular.
    "fid": MetricSpec("inception", other_name="fd", min_samples=2048),
    "sfid": MetricSpec("inception", output="spatial", other_name="sfd", min_samples=2048),
    "is": MetricSpec(
        "inception", values.inception_score, "marginals", "logits_unbiased",
        needs_reference=False, higher_is_better=True, min_samples=5000,
    ),
    "kid": MetricSpec("inception", values.kid, "rows", min_samples=1000),
    # A ball reaches to the k-th nearest other row.
    "precision": MetricSpec(
        "inception", values.precision, "rows",
        higher_is_better=True, min_samples=values.NEIGHBOURS + 1,
    ),
    "recall": MetricSpec(
        "inception", values.recall, "rows",
        higher_is_better=True, min_samples=values.NEIGHBOURS + 1,
    ),
    "fd_dinov2": MetricSpec("dinov2", other_name="fd", min_samples=1024),
}  # fmt: skip


def check_metric(name: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless `name` is a metric for images of shape (H, W, C)."""
    expected = EXTRACTORS[find(name).extractor].image_shape
    if not fits(image_shape, expected):
        raise UserError(
            f"The metric {name} measures images of shape {shape_text(expected)}, but these are "
            f"{image_shape}; expected the former: choose another metric for them."
        )


def check_count(name: str, count: int, what: str, section: Mapping[str, Any]) -> None:
    """Raises UserError if `count` images are too few for a metric.

    Args:
        name: key of METRICS.
        count: of the images.
        what: says which images they are, for the sentence.
        section: eval of the config, whose `allow_small_n` allows any number.
    """
    at_least = find(name).min_samples
    if count < at_least and not section.get("allow_small_n", False):
        raise UserError(
            f"{what} is too few for the metric {name}, which so few give a bias that hides what is "
            f"measured; expected {at_least:,} or more: raise it, or set allow_small_n=True (a key "
            "of eval in the config file, a flag elsewhere)."
        )


def protocols_of(extractor: str, section: Mapping[str, Any]) -> list[Protocol]:
    """The protocols that a network is used with: those that the section names, or its first."""
    there = EXTRACTORS[extractor].protocols
    chosen = [there[name] for name in section.get("protocols", ()) if name in there]
    return chosen or [next(iter(there.values()))]


def check_protocols(section: Mapping[str, Any]) -> None:
    """Raises UserError for a protocol that none of the section's metrics has."""
    extractors = dict.fromkeys(find(name).extractor for name in section["metrics"])
    # Where nothing is measured, any name of a protocol will do.
    of_metrics = {name for e in extractors for name in EXTRACTORS[e].protocols}
    known = of_metrics or {name for spec in EXTRACTORS.values() for name in spec.protocols}
    for name in section.get("protocols", ()):
        if name not in known:
            raise UserError(
                f"eval.protocols holds {name!r}, which is none of the protocols of these metrics, "
                f"{', '.join(sorted(known))}; expected some of them: leave it out."
            )


def check_files(name: str, section: Mapping[str, Any]) -> None:
    """Raises UserError if a file that the metric needs is missing or another one."""
    spec = EXTRACTORS[find(name).extractor]
    if spec.files:
        importlib.import_module(spec.files).check(**_options(spec, section))


def load_extractor(name: str, protocol: Protocol, section: Mapping[str, Any]) -> "Extractor":
    """Loads a network.

    Args:
        name: key of EXTRACTORS.
        protocol: one of those it may be used with.
        section: eval of the config, which has its options.

    Raises:
        UserError: weights that are missing or do not match their record.
    """
    spec = EXTRACTORS[name]
    module = importlib.import_module(spec.module)
    return module.load_extractor(name, protocol, **_options(spec, section))


def label(name: str, extractor: "Extractor", num_samples: int) -> str:
    """What a number is called.

    "fid" with the published weights and 50,000 samples, "fid_5000" with fewer, with other weights
    "fd_inception_random_50" or "kid_inception_1a2b3c4d".
    """
    spec = find(name)
    if extractor.weights:
        name = f"{spec.other_name or name}_{extractor.name}_{extractor.weights}"
    return name if num_samples == FULL or not spec.names_count else f"{name}_{num_samples}"


def higher_is_better(label: str) -> bool:
    """Whether better samples have more of what `label` has named.

    The protocol may stand behind it: "fid_5000 (adm)".

    Raises:
        UserError: it is the name of no metric.
    """
    known = {
        stem: spec.higher_is_better
        for name, spec in METRICS.items()
        for stem in (name, spec.other_name)
        if stem
    }
    stem = label.partition(" ")[0]
    while stem and stem not in known:  # without weights and number of samples, one by one
        stem = stem.rpartition("_")[0]
    return known[stem] if stem else find(label).higher_is_better  # which refuses it


def _options(spec: ExtractorSpec, section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: section[key] for key in spec.options if key in section}


def find(name: str) -> MetricSpec:
    """The metric of a name (UserError if there is none)."""
    if name not in METRICS:
        raise UserError(
            f"There is no metric {name!r}; expected one of {', '.join(sorted(METRICS))}."
        )
    return METRICS[name]
