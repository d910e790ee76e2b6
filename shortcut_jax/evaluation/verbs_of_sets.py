"""Verbs of the evaluation binary for sets of images; their flags are in `shortcut_jax.eval`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import config_flag, data, metrics, run, versions
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import image_sets, reports
from shortcut_jax.files import check_writable, write_atomically
from shortcut_jax.metrics import gauges as gauges_lib
from shortcut_jax.metrics import references
from shortcut_jax.parallel import distributed, preemption

FLAGS = flags.FLAGS

# Flags that are keys of the section eval where there is no config, and those that say of statistics
# what images say themselves.
_EVAL_KEYS = (
    "metrics", "protocols", "allow_small_n", "inception_weights", "inception_sha256",
    "dinov2_weights", "dinov2_sha256",
)  # fmt: skip
_OF_STATISTICS = ("image_size", "num_images")


def ref() -> None:
    """Builds statistics of a reference and stores them with what they are."""
    preemption.heed_no_longer()
    if not FLAGS.out or Path(FLAGS.out).suffix != ".npz":
        raise UserError(f"--out={FLAGS.out} is no file to write; expected an .npz: give its name.")
    out, config = Path(FLAGS.out), config_flag.CONFIG.value
    if (config is None) == (FLAGS.images is None):
        raise UserError(
            "ref needs either --config, whose data set it reads, or --images; expected just one of "
            "them: give one."
        )
    if config is not None:
        run.check(config)
        _refuse_beside("--config", (*_EVAL_KEYS, *_OF_STATISTICS))
    section = _section() if config is None else config.eval
    _check_metrics(section)
    if config is None:
        found = _of_images(Path(FLAGS.images), section)
    else:
        images = data.open_dataset(config.data)
        origin, workers = data.origin(config.data), config.data.get("workers", 0)
        found = _of_dataset(images, section, workers, origin)
    if FLAGS.dry_run:
        return
    check_writable("--out", out.parent)
    made = found()
    if distributed.writes():
        references.save(out, made)
    print(references.describe(made))
    print(f"statistics  {out}")


def calc() -> None:
    """Compares two sets of images, or one with stored statistics."""
    for name in ("images", "reference"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing; give images, e.g. --{name}=samples.npz.")
    section, path = _section(), Path(FLAGS.reference)
    _check_metrics(section)
    images = image_sets.open_images(Path(FLAGS.images), _channels(section))
    _check_set(images, FLAGS.images, section)
    stored = path.suffix == ".npz" and "about" in references.npz_names(path)
    there = references.load(path) if stored else []
    other = None if stored else _of_images(path, section)
    if FLAGS.out:
        check_writable("--out", Path(FLAGS.out).parent)
    gauges = gauges_lib.build(section)
    if stored:
        found = [references.choose(path, there, gauge) for gauge in gauges]
    for reference in found if stored else []:
        references.check_shape(path, reference, images.image_shape)
    if FLAGS.dry_run:
        return
    if other is not None:
        found = other()
    collections = [gauge.of_samples(images.size) for gauge in gauges]
    gauges_lib.measure(gauges, collections, images)
    records = [
        {
            "metric": metrics.label(name, gauge.extractor, images.size),
            "protocol": gauge.extractor.protocol.name,
            "value": value.value,
            **value.facts,
            "num_samples": images.size,
            "images": str(FLAGS.images),
            "images_fingerprint": images.fingerprint,
            "extractor_sha256": gauge.extractor.sha256,
            "reference": reference.facts.get("source"),
            "reference_size": reference.facts.get("num_images"),
            "reference_sha256": reference.sha256,
            **versions.recorded(),
        }
        for gauge, collection, reference in zip(gauges, collections, found, strict=True)
        for name, value in gauge.values(collection, reference.summaries).items()
    ]
    width = max(len(reports.metric_name(record)) for record in records)
    for record in records:
        print(f"{reports.metric_name(record):<{width}}  {record['value']:.6f}")
    if FLAGS.out and distributed.writes():
        write_atomically(Path(FLAGS.out), json.dumps(records, indent=1).encode())


def _section() -> dict[str, Any]:
    """The section eval that the flags stand for."""
    values = {name: FLAGS[name].value for name in _EVAL_KEYS}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _refuse_beside(what: str, names: Sequence[str]) -> None:
    """Raises UserError if a flag is given that would not be heard."""
    for name in names:
        if FLAGS[name].present:
            raise UserError(
                f"--{name} is given beside {what}, which says that itself; expected one of the "
                f"two: leave out --{name}."
            )


def _check_metrics(section: Mapping[str, Any]) -> None:
    if not section["metrics"]:
        raise UserError("no metrics are named; expected some, such as fid: give --metrics.")
    metrics.check_protocols(section)
    for name in section["metrics"]:
        metrics.check_files(name, section)


def _channels(section: Mapping[str, Any]) -> int:
    """Of the images that the metrics take; a later metric for others is refused."""
    first = metrics.find(section["metrics"][0]).extractor
    return metrics.EXTRACTORS[first].image_shape[2]


def _check_set(images: Dataset, where: Any, section: Mapping[str, Any]) -> None:
    for name in section["metrics"]:
        metrics.check_metric(name, images.image_shape)
        metrics.check_count(name, images.size, f"{where} of {images.size} images", section)


def _of_dataset(
    images: Dataset,
    section: Mapping[str, Any],
    workers: int,
    origin: Mapping[str, str | None] | None = None,
) -> Callable[[], list[references.Reference]]:
    """Checks, and returns what measures."""
    _check_set(images, images.name, section)
    return lambda: references.measure(gauges_lib.build(section), images, workers, origin)


def _of_images(path: Path, section: Mapping[str, Any]) -> Callable[[], list[references.Reference]]:
    """Checks images, or statistics of others, and returns what makes a reference of them."""
    names = references.npz_names(path) if path.suffix == ".npz" else []
    images = None
    if "mu" not in names or image_sets.ARRAY in names:
        images = image_sets.open_images(path, _channels(section))
    if "mu" not in names:
        assert images is not None
        _refuse_beside(f"the images of {path}", _OF_STATISTICS)
        return _of_dataset(images, section, workers=0)
    if images is not None:
        _refuse_beside(f"the images of {path}", ("image_size",))
    elif not FLAGS.image_size:
        raise UserError(
            f"{path} holds mu and sigma, but not the size of the images behind them; expected it, "
            "so that others are refused: give --image_size=256, for example."
        )
    arrays = references.read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"))
    size = FLAGS.image_size
    facts = {
        "image_shape": list(images.image_shape if images else (size, size, 3)),
        "num_images": FLAGS.num_images,
    }

    def make() -> list[references.Reference]:
        gauges = gauges_lib.build(section)
        # ADM's files have 10,000 of the images, for precision and recall.
        rows = references.measure(gauges, images, workers=0)  # empty without images
        return [
            references.foreign(path, arrays, gauge, facts, of_images.summaries)
            for gauge, of_images in zip(gauges, rows, strict=True)
        ]

    return make
