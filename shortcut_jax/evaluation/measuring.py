"""Evaluation: one code path for the training loop and the evaluation binary.

Samples in 1, 2, 4 ... steps from the same noise; exactly N of them; everything that the metrics
need of them in one pass; every number written with its whole protocol.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from shortcut_jax import data, metrics, run, sampling, state, versions
from shortcut_jax.data.sources import Dataset
from shortcut_jax.evaluation.grid import Cell
from shortcut_jax.evaluation.partial import Partial
from shortcut_jax.evaluation.sample_files import Sink, Sinks
from shortcut_jax.metrics import gauges as gauges_lib
from shortcut_jax.metrics import references
from shortcut_jax.metrics.protocols import QUANTISE
from shortcut_jax.parallel import distributed, sharding
from shortcut_jax.progress import Progress

T = TypeVar("T")
Outputs = Callable[[], dict[str, NDArray[np.float32]]]  # of a network, waited for when called
Gathered = dict[str, Callable[[], NDArray[np.float32]]]  # the same of all processes


class Batch(NamedTuple):
    """Samples on their way into summaries."""

    first: int  # index of the first sample
    images: NDArray[np.float32]  # of this process
    labels: jax.Array  # of all
    outputs: list[Gathered]  # by gauge


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation of one checkpoint found."""

    step: int  # of the checkpoint
    records: list[dict[str, Any]]  # one per cell and metric
    samples: dict[Cell, NDArray[np.uint8]]  # the first samples [n, H, W, C], for pictures


class Evaluator:
    """Samples from parameters of one network, and measures the samples.

    Args:
      setup: from `run.prepare`.
      images: the reference, all rows of the split that is trained on; None if nothing is measured,
        or the config names stored statistics.
      params_sharding: tree of shardings of the parameters.

    Raises:
      UserError: the weights of a metric, or stored statistics, are not what is asked for.
    """

    def __init__(self, setup: run.Setup, images: Dataset | None, params_sharding: Any):
        self._setup, self._params_sharding = setup, params_sharding
        self._samplers: dict[float, sampling.Sampler] = {}
        section = setup.config.eval
        self._gauges = gauges_lib.build(section)
        self._references: list[references.Reference] | None = None
        stored = section.get("reference", "")
        if stored and self._gauges:
            path = Path(stored)
            there = references.load(path)
            self._references = [references.choose(path, there, g) for g in self._gauges]
            for reference in self._references:
                references.check_shape(path, reference, data.describe(setup.config.data)[0])
                references.check_origin(path, reference, data.origin(setup.config.data))
                self._check_count(reference.facts["num_images"], path)
        else:
            self._images = images
            if images is not None:
                self._check_count(images.size, f"{images.name}/{images.split}")

    def _check_count(self, count: int | None, where: Any) -> None:
        section = self._setup.config.eval
        for name in section.metrics:
            if metrics.find(name).needs_reference and count is not None:
                what = f"The reference {where} of {count} images"
                metrics.check_count(name, count, what, section)

    def run(
        self,
        params: Any,
        step: int,
        cells: Sequence[Cell],
        *,
        partial: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        sink: Sinks | None = None,
    ) -> Evaluation:
        """Samples and measures.

        Args:
          params: the parameters that the cells name.
          step: training step they come from, for the record.
          cells: ways to sample.
          partial: folder that keeps what a killed evaluation goes on from.
          identity: what says, with step and config, that parameters are the same as before.
          sink: makes what takes all samples of a cell; also told step, config and identity.
        """
        records, pictures = [], {}
        for cell in cells:
            decisive = {"step": step, **self._facts(cell), **(identity or {})}
            into = sink(cell, decisive) if sink else None
            if into is not None:
                decisive["sink"] = str(into.path)
            kept = Partial(partial, decisive)
            collections, pictures[cell] = self._sample(params, cell, kept, into)
            for gauge, collection, reference in zip(
                self._gauges, collections, self.compared_with(), strict=True
            ):
                for name, value in gauge.values(collection, reference.summaries).items():
                    records.append(self._record(gauge, reference, name, value, step, cell))
        return Evaluation(step, records, pictures)

    def compared_with(self) -> list[references.Reference]:
        """What samples are compared with, by gauge; a data set is read when this is first asked."""
        if self._references is None:
            workers = self._setup.config.data.get("workers", 0)
            self._references = references.measure(self._gauges, self._images, workers)
        return self._references

    def try_out(self, params: Any, cells: Sequence[Cell]) -> None:
        """Samples and measures one batch for nothing, so that what fails does so at once.

        One with each of the compiled samplers, in the fewest steps. Nothing is done if a batch is
        all there is.
        """
        section = self._setup.config.eval
        if section.num_samples <= section.batch_size:
            return
        first: dict[tuple[float, bool], Cell] = {}
        for cell in sorted(cells, key=lambda cell: cell.num_steps):
            first.setdefault((cell.cfg_scale, self._setup.objective.guided(cell.num_steps)), cell)
        for cell in first.values():
            collections = [gauge.of_samples(section.batch_size) for gauge in self._gauges]
            images, _ = self._dispatch(params, cell, 0)
            begun = self._begin(sharding.local_rows(images))
            self._update(collections, self._gather(begun), section.batch_size)

    def _sample(
        self, params: Any, cell: Cell, partial: Partial, sink: Sink | None
    ) -> tuple[list[gauges_lib.Collection], NDArray[np.uint8]]:
        """Exactly num_samples samples: their summaries, and the first ones as pictures."""
        section = self._setup.config.eval
        total, size = section.num_samples, section.batch_size
        collections = [gauge.of_samples(total) for gauge in self._gauges]
        stored = partial.load()
        closed = sink is not None and int(stored.get("closed", 0)) == sink.stamp() != 0
        if sink is not None and not (sink.resumes or closed):
            stored = {}
        begin = int(stored.get("next", 0))
        distributed.agree({"first sample to draw": begin})  # all have read it from one folder
        # Samples that are not in the sink must be drawn again, also if this pass is killed at once.
        if not stored and distributed.writes():
            partial.remove()
        pictures = [stored["pictures"]] if begin else []
        for i, collection in enumerate(collections if begin else []):
            prefix = f"{i}/"
            collection.restore(
                {k.removeprefix(prefix): a for k, a in stored.items() if k.startswith(prefix)}
            )
        progress = Progress(f"samples in {cell.num_steps} steps", total, begin)
        for batch in self._batches(params, cell, begin):
            n = min(size, total - batch.first)  # the last batch is sampled whole and cut
            self._update(collections, batch.outputs, n)
            if sum(map(len, pictures)) < section.grid_rows:
                pictures.append(sampling.to_uint8(self._whole(batch.images)[:n]))
            done = batch.first + n
            if sink is not None:
                rows = self._whole(batch.images)[:n], sharding.to_host(batch.labels)[:n]
                if distributed.writes():
                    sink.write(batch.first, *rows)
            if distributed.writes():
                partial.store(_state(done, pictures, collections), now=done == total)
            progress(done)
        if sink is not None and not closed and distributed.writes():
            sink.close()
            whole = {"closed": np.asarray(sink.stamp())}
            partial.store(_state(total, pictures, collections) | whole, now=True)
        return collections, np.concatenate(pictures)[: section.grid_rows]

    def _batches(self, params: Any, cell: Cell, begin: int) -> Iterator[Batch]:
        """All samples from `begin` on, in order.

        Devices do what they are given in turn. So that they always have something, batch i + 3 is
        drawn, the networks of the gauges see batch i + 2, and what they gave for batch i + 1 is
        sent to all processes, before that of batch i is read.
        """
        section = self._setup.config.eval
        firsts = range(begin, section.num_samples, section.batch_size)
        drawn = ((first, *self._dispatch(params, cell, first)) for first in firsts)
        seen = (
            (first, own := sharding.local_rows(images), labels, self._begin(own))
            for first, images, labels in one_ahead(drawn)
        )
        return one_ahead(
            Batch(first, own, labels, self._gather(begun))
            for first, own, labels, begun in one_ahead(seen)
        )

    def _dispatch(self, params: Any, cell: Cell, first: int) -> tuple[jax.Array, jax.Array]:
        """Starts one batch of samples, decoded, and their labels; all have one shape."""
        indices = np.arange(first, first + self._setup.config.eval.batch_size)
        x, labels = self._sampler(cell.cfg_scale)(params, indices, cell.num_steps)
        return self._setup.space.decode(x), labels

    def _begin(self, images: NDArray[Any]) -> list[Outputs]:
        """Gives images to the network of every gauge, without waiting for it."""
        return [gauge.extractor.begin(images) for gauge in self._gauges]

    def _gather(self, begun: Sequence[Outputs]) -> list[Gathered]:
        """Waits for what the networks give for the rows of this process; not for that of others."""
        mesh = self._setup.mesh
        return [
            {name: sharding.begin_gather(rows, mesh) for name, rows in outputs().items()}
            for outputs in begun
        ]

    def _update(
        self, collections: Sequence[gauges_lib.Collection], outputs: Sequence[Gathered], n: int
    ) -> None:
        """Adds the first n images of a batch."""
        for gathered, collection in zip(outputs, collections, strict=True):
            collection.update({name: finish()[:n] for name, finish in gathered.items()})

    def _whole(self, rows: NDArray[Any]) -> NDArray[Any]:
        """A batch of which each process has its own rows."""
        return sharding.begin_gather(rows, self._setup.mesh)()

    def _sampler(self, cfg_scale: float) -> sampling.Sampler:
        if cfg_scale not in self._samplers:
            setup = self._setup
            self._samplers[cfg_scale] = sampling.make_sampler(
                dataclasses.replace(setup.objective, cfg_scale=cfg_scale),  # type: ignore[type-var]
                state.apply_fn(setup.network),
                self._params_sharding,
                setup.mesh,
                seed=setup.config.eval.seed,
                image_shape=setup.image_shape,
                num_classes=setup.num_classes,
            )
        return self._samplers[cfg_scale]

    def _facts(self, cell: Cell) -> dict[str, Any]:
        """What decides the samples of a cell, beside the checkpoint."""
        setup, config = self._setup, self._setup.config
        return {
            "num_samples": config.eval.num_samples,
            "sampling_steps": cell.num_steps,
            "sampler": setup.objective.sampler,
            "objective": config.objective.name,
            "params": cell.params,
            "ema_rate": config.ema_rate,
            "cfg_scale": cell.cfg_scale,
            "guided": sampling.is_guided(setup.objective, cell.cfg_scale, cell.num_steps),
            "labels": "uniform",
            "seed": config.eval.seed,
            **setup.space.record(),
            "dtype": np.dtype(setup.network.dtype).name,
            "backend": jax.default_backend(),
            "devices": setup.mesh.size,
            "batch_size": config.eval.batch_size,
            "config_hash": run.config_hash(config),
            **versions.recorded(),
        }

    def _record(
        self,
        gauge: gauges_lib.Gauge,
        reference: references.Reference,
        name: str,
        value: metrics.Value,
        step: int,
        cell: Cell,
    ) -> dict[str, Any]:
        extractor, facts = gauge.extractor, self._facts(cell)
        against = {
            "reference": reference.facts["source"],
            "reference_size": reference.facts["num_images"],
            "reference_fingerprint": reference.facts["fingerprint"],
            "reference_sha256": reference.sha256,
        }
        return {
            "metric": metrics.label(name, extractor, facts["num_samples"]),
            "value": value.value,
            **value.facts,
            "step": step,
            **facts,
            "protocol": extractor.protocol.name,
            "quantisation": QUANTISE[extractor.protocol.quantise][1],
            "resize": extractor.protocol.text,
            "extractor_sha256": extractor.sha256,
            **(against if metrics.find(name).needs_reference else {}),
        }


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given when the one after it is there, too."""
    ahead: list[T] = []
    for item in items:
        ahead.append(item)
        if len(ahead) > 1:
            yield ahead.pop(0)
    yield from ahead


def _state(
    done: int,
    pictures: Sequence[NDArray[np.uint8]],
    collections: Sequence[gauges_lib.Collection],
) -> dict[str, NDArray[Any]]:
    """What a pass goes on from."""
    found = {"next": np.asarray(done), "pictures": np.concatenate(pictures)}
    for i, collection in enumerate(collections):
        found |= {f"{i}/{name}": array for name, array in collection.arrays().items()}
    return found
