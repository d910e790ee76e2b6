"""Evaluation: one code path for the training loop and the evaluation binary.

Samples in 1, 2, 4 ... steps from the same noise; exactly N of them; distances to the data in the
features of each metric; every number written with its whole protocol.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from shortcut_jax import checkpoint, data, metrics, pictures, run, sampling, sharding, state
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset
from shortcut_jax.files import write_atomically
from shortcut_jax.logs import MetricLogger


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation of one checkpoint found."""

    step: int  # of the checkpoint
    records: list[dict[str, Any]]  # one per metric and number of sampling steps
    samples: dict[int, np.ndarray]  # sampling steps -> uint8 [n, H, W, C], the first n samples
    labels: np.ndarray  # [n] int32

    def first_rows(self, n: int) -> "Evaluation":
        """The same with no more than n samples."""
        samples = {steps: images[:n] for steps, images in self.samples.items()}
        return dataclasses.replace(self, samples=samples, labels=self.labels[:n])


class Evaluator:
    """Measures parameters of one network against one data set.

    Args:
      setup: from `run.prepare`.
      images: the reference, all rows of the split that is trained on; None if nothing is measured.
      params_sharding: tree of shardings of the parameters.
    """

    def __init__(self, setup: run.Setup, images: Dataset | None, params_sharding: Any):
        self._setup = setup
        self._images = images
        self._sample = sampling.make_sampler(
            setup.objective,
            state.apply_fn(setup.network),
            params_sharding,
            setup.mesh,
            seed=setup.config.eval.seed,
            image_shape=setup.image_shape,
            num_classes=setup.num_classes,
        )
        section = setup.config.eval
        for name in section.metrics:
            size = self._dataset.size
            what = f"The reference {self._dataset.name}/{self._dataset.split} of {size} images"
            metrics.check_count(name, size, what, section)
        self._extractors = {
            name: metrics.load_extractor(name, **metrics.options(name, section))
            for name in section.metrics
        }
        self._references: dict[str, metrics.Stats] = {}

    def run(self, params: Any, step: int, steps: Sequence[int], keep: int = 0) -> Evaluation:
        """Samples and measures.

        Args:
          params: the parameters that `config.eval.params` names.
          step: training step they come from, for the record.
          steps: numbers of sampling steps.
          keep: how many samples to return; the picture's rows at least.
        """
        config = self._setup.config
        keep = min(config.eval.num_samples, max(keep, config.eval.grid_rows))
        records, kept = [], {}
        labels = np.zeros(0, np.int32)
        for num_steps in steps:
            moments = {name: metrics.Moments() for name in self._extractors}
            images: list[np.ndarray] = []
            labels_kept: list[np.ndarray] = []
            for batch, batch_labels in self._samples(params, num_steps):
                for name, extractor in self._extractors.items():
                    moments[name].update(extractor.features(batch))
                if sum(len(image) for image in images) < keep:
                    images.append(batch)
                    labels_kept.append(batch_labels)
            kept[num_steps] = np.concatenate(images)[:keep]
            labels = np.concatenate(labels_kept)[:keep]
            for name in self._extractors:
                value = metrics.frechet_distance(moments[name], self._reference(name))
                records.append(self._record(name, value, step, num_steps))
        return Evaluation(step, records, kept, labels)

    def _samples(self, params: Any, num_steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Exactly num_samples of uint8 images [b, H, W, C] and labels [b]."""
        total, size = self._setup.config.eval.num_samples, self._setup.config.eval.batch_size
        for first in range(0, total, size):
            # The last batch is sampled whole and cut: every program has one shape.
            images, labels = self._sample(params, np.arange(first, first + size), num_steps)
            n = min(size, total - first)
            pixels = sharding.to_host(self._setup.space.decode(images))[:n]
            yield sampling.to_uint8(pixels), sharding.to_host(labels)[:n]

    def _reference(self, name: str) -> metrics.Stats:
        if name not in self._references:
            moments = metrics.Moments()
            workers = self._setup.config.data.get("workers", 0)
            size = min(1000, 2**25 // math.prod(self._dataset.image_shape))  # up to 32 MiB
            with pipeline.reading(self._dataset, workers) as images:
                for rows in pipeline.in_order(images, 0, images.size, size, max(2, workers)):
                    moments.update(self._extractors[name].features(rows["image"]))
            self._references[name] = metrics.Stats(moments.mean, moments.cov)
        return self._references[name]

    @property
    def _dataset(self) -> Dataset:
        assert self._images is not None  # because there are metrics
        return self._images

    def _record(self, name: str, value: float, step: int, num_steps: int) -> dict[str, Any]:
        setup, config, reference = self._setup, self._setup.config, self._reference(name)
        extractor = self._extractors[name]
        return {
            "metric": metrics.label(name, extractor, config.eval.num_samples),
            "value": value,
            "step": step,
            "num_samples": config.eval.num_samples,
            "sampling_steps": num_steps,
            "sampler": setup.objective.sampler,
            "objective": config.objective.name,
            "params": config.eval.params,
            "ema_rate": config.ema_rate,
            "cfg_scale": config.objective.cfg_scale,
            "guided": setup.objective.guided(num_steps) and config.objective.cfg_scale != 1.0,
            "labels": "uniform",
            "seed": config.eval.seed,
            **setup.space.record(),
            "quantisation": "uint8, (x+1)*127.5 rounded",
            "resize": extractor.resize,
            "extractor_sha256": extractor.sha256,
            "reference": f"{self._dataset.name}/{self._dataset.split}",
            "reference_size": self._dataset.size,
            "reference_fingerprint": self._dataset.fingerprint,
            "reference_sha256": hashlib.sha256(
                reference.mean.tobytes() + reference.cov.tobytes()
            ).hexdigest(),
            "dtype": np.dtype(setup.network.dtype).name,
            "backend": jax.default_backend(),
            "devices": setup.mesh.size,
            "batch_size": config.eval.batch_size,
            "config_hash": run.config_hash(config),
            **run.versions(),
        }


def evaluate_checkpoint(
    setup: run.Setup, workdir: str | os.PathLike[str], step: int, keep: int = 0
) -> Evaluation:
    """Samples from a checkpoint in all numbers of `config.eval.steps`, and measures.

    Args:
      setup: from `run.prepare`.
      workdir: of the run.
      step: of the checkpoint.
      keep: see `Evaluator.run`.

    Raises:
      UserError: data or checkpoint cannot be read.
    """
    config = setup.config
    images = data.open_dataset(config.data) if config.eval.metrics else None
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, read_only=True)
    params, shardings = run.restore_params(setup, checkpoints, step, config.eval.params)
    logging.info("Evaluating the %s parameters of step %d.", config.eval.params, step)
    return Evaluator(setup, images, shardings).run(params, step, config.eval.steps, keep)


def report(
    workdir: str | os.PathLike[str], found: Evaluation, logger: MetricLogger | None = None
) -> Path | None:
    """Writes records to eval/results.jsonl and pictures to eval/STEP/; on process 0 only.

    A record replaces an earlier one of the same protocol, so evaluating again leaves one line.

    Returns:
      The folder of the pictures, or None on other processes.
    """
    if jax.process_index() != 0:
        return None
    folder = Path(workdir) / "eval" / str(found.step)
    folder.mkdir(parents=True, exist_ok=True)
    _write_records(folder.parent / "results.jsonl", found.records)
    rows = min(map(len, found.samples.values()))
    grid = pictures.sample_grid(found.samples, folder / "samples.png", rows=rows)
    points: dict[str, list[tuple[int, float]]] = {}
    for record in found.records:
        points.setdefault(record["metric"], []).append((record["sampling_steps"], record["value"]))
    if points:
        pictures.curve(points, folder / "curve.png", "distance", f"step {found.step:,}")
    for record in found.records:
        logging.info(
            "%s at step %d, %d sampling steps, %d samples: %.4f",
            *(record[k] for k in ("metric", "step", "sampling_steps", "num_samples", "value")),
        )
    if logger is not None:
        logger.scalars(
            found.step,
            {f"eval/{r['metric']}/{r['sampling_steps']}_steps": r["value"] for r in found.records},
        )
        logger.image(found.step, "samples", grid)
    return folder


def table(records: Sequence[dict[str, Any]]) -> str:
    """Metrics by number of sampling steps, as text."""
    columns = sorted({r["sampling_steps"] for r in records})
    names = list(dict.fromkeys(r["metric"] for r in records))
    values = {(r["metric"], r["sampling_steps"]): r["value"] for r in records}
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{n:>9}" for n in columns) + "   sampling steps"]
    for name in names:
        cells = [f"{values[name, n]:9.3f}" if (name, n) in values else " " * 9 for n in columns]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    def protocol(record):
        return {k: v for k, v in record.items() if k != "value"}

    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = [protocol(record) for record in records]
    lines = [r for r in old if protocol(r) not in new] + list(records)
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in lines).encode())
