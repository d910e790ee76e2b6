"""The value of each metric, from the summaries of samples and of a reference."""

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.metrics import frechet as frechet_lib
from shortcut_jax.metrics import inception_score as inception_score_lib
from shortcut_jax.metrics import kid as kid_lib
from shortcut_jax.metrics import precision_recall
from shortcut_jax.metrics.protocols import Protocol
from shortcut_jax.metrics.summaries import Rows

NEIGHBOURS = 3  # k of precision and recall
SUBSET_SIZE = 1000  # of the KID


class Value(NamedTuple):
    """A number, and what else a record says of it: its spread, or settings of the metric."""

    value: float
    facts: dict[str, Any]


def frechet(samples: Any, reference: Any, protocol: Protocol) -> Value:
    """The Fréchet distance of `frechet.Moments`."""
    return Value(frechet_lib.frechet_distance(samples, reference, protocol.offset), {})


def inception_score(samples: Any, reference: Any, protocol: Protocol) -> Value:
    """The Inception score of `summaries.Marginals`."""
    del reference, protocol
    mean, std = inception_score_lib.inception_score(samples)
    return Value(mean, {"std": std, "splits": samples.splits})


def kid(samples: Any, reference: Any, protocol: Protocol) -> Value:
    """The kernel inception distance of `summaries.Rows`."""
    del protocol
    # Smaller where `allow_small_n` lets in fewer images.
    size = min(SUBSET_SIZE, len(samples.rows), len(reference.rows))
    mean, std = kid_lib.kid(samples, reference, subset_size=size)
    return Value(mean, {"std": std, "subset_size": size} | _rows(samples, reference))


def precision(samples: Any, reference: Any, protocol: Protocol) -> Value:
    """The share of samples within the reference, of `summaries.Rows`."""
    del protocol
    found = precision_recall.precision(samples, reference, NEIGHBOURS, _radii(reference))
    return Value(found, {"k": NEIGHBOURS} | _rows(samples, reference))


def recall(samples: Any, reference: Any, protocol: Protocol) -> Value:
    """The share of the reference within the samples, of `summaries.Rows`."""
    del protocol
    found = precision_recall.recall(samples, reference, NEIGHBOURS)
    return Value(found, {"k": NEIGHBOURS} | _rows(samples, reference))


@functools.lru_cache(maxsize=4)  # a reference is compared with many sets of samples
def _radii(reference: Rows) -> NDArray[np.float64]:
    return precision_recall.squared_radii(reference, NEIGHBOURS)


def _rows(samples: Any, reference: Any) -> dict[str, int]:
    return {"sample_rows": len(samples.rows), "reference_rows": len(reference.rows)}
