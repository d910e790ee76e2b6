"""What is measured in one pass over images: networks under protocols, and summaries of outputs."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortcut_jax import metrics
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.summaries import Marginals, Moments, Rows, Summary
from shortcut_jax.progress import Progress

# Of a reference, no more rows are kept for metrics of pairs of images, drawn from all: as many as
# ADM's reference batches have images.
REFERENCE_ROWS = 10_000
SPLITS = 10  # of the Inception score


class Key(NamedTuple):
    """Names a summary: key of `SUMMARIES`, output of the extractor."""

    summary: str
    output: str


# total rows that will come, largest number of rows to keep -> an empty summary
SUMMARIES: dict[str, Callable[[int, int | None], Any]] = {
    "moments": lambda total, limit: Moments(),
    "rows": Rows,
    "marginals": lambda total, limit: Marginals(total, min(SPLITS, total)),
}
CLASSES: dict[str, Any] = {"moments": Moments, "rows": Rows, "marginals": Marginals}


class Collection:
    """Summaries of one set of images, filled from the outputs of one extractor.

    Args:
        keys: of the summaries.
        total: images that will come.
        limit: see `Rows`.
    """

    def __init__(self, keys: Iterable[Key], total: int, limit: int | None = None) -> None:
        self.summaries: dict[Key, Summary] = {
            key: SUMMARIES[key.summary](total, limit) for key in dict.fromkeys(keys)
        }

    def update(self, outputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Adds the outputs of the next images."""
        for key, summary in self.summaries.items():
            summary.update(outputs[key.output])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything, under names SUMMARY/OUTPUT/ARRAY."""
        return {
            f"{key.summary}/{key.output}/{name}": array
            for key, summary in self.summaries.items()
            for name, array in summary.arrays().items()
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from what `arrays` of a like collection gave."""
        for key in self.summaries:
            prefix = f"{key.summary}/{key.output}/"
            own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
            self.summaries[key] = CLASSES[key.summary].from_arrays(own)


@dataclasses.dataclass(frozen=True)
class Gauge:
    """A network under a protocol, and the metrics computed from what it gives.

    Attributes:
        extractor: the network.
        names: of the metrics, keys of `metrics.METRICS`.
    """

    extractor: Extractor
    names: tuple[str, ...]

    def of_samples(self, total: int) -> Collection:
        """Room for what the metrics need of `total` samples."""
        return Collection(map(_key, self.names), total)

    def of_reference(self, total: int) -> Collection:
        """Room for what the metrics need of a reference of `total` images."""
        return Collection(self.reference_keys(), total, REFERENCE_ROWS)

    def reference_keys(self) -> list[Key]:
        """What the metrics need of a reference."""
        needed = (name for name in self.names if metrics.find(name).needs_reference)
        return list(dict.fromkeys(map(_key, needed)))

    def values(self, samples: Collection, reference: Mapping[Key, Any]) -> dict[str, metrics.Value]:
        """Key of METRICS -> value; of a reference, what `reference_keys` says."""
        found = {}
        for name in self.names:
            spec, key = metrics.find(name), _key(name)
            other = reference[key] if spec.needs_reference else None
            found[name] = spec.value(samples.summaries[key], other, self.extractor.protocol)
        return found


def build(section: Mapping[str, Any]) -> list[Gauge]:
    """One gauge for each network and protocol that the metrics of a section of the config need.

    Args:
        section: eval of the config.

    Raises:
        UserError: weights that are missing or do not match their record.
    """
    by_extractor: dict[str, list[str]] = {}
    for name in section["metrics"]:
        by_extractor.setdefault(metrics.find(name).extractor, []).append(name)
    return [
        Gauge(metrics.load_extractor(extractor, protocol, section), tuple(names))
        for extractor, names in by_extractor.items()
        for protocol in metrics.protocols_of(extractor, section)
    ]


def measure(
    gauges: Sequence[Gauge], collections: Sequence[Collection], images: Dataset, workers: int = 0
) -> None:
    """Fills the collection of each gauge in one pass over a data set.

    Args:
        gauges: networks.
        collections: one for each, with room for all images.
        images: uint8 or float32 images.
        workers: processes that decode, 0 for threads.
    """
    size = max(1, min(1000, 2**25 // math.prod(images.image_shape)))  # up to 32 MiB of uint8
    progress, done = Progress(f"images of {images.name}", images.size), 0
    with pipeline.reading(images, workers) as source:
        for rows in pipeline.in_order(source, 0, images.size, size, max(2, workers)):
            for gauge, collection in zip(gauges, collections, strict=True):
                collection.update(gauge.extractor.outputs(rows["image"]))
            done += len(rows["image"])
            progress(done)


def _key(name: str) -> Key:
    spec = metrics.find(name)
    return Key(spec.summary, spec.output)
