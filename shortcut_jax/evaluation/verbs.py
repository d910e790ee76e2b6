"""The verbs of the evaluation binary; their flags are in `shortcut_jax.eval`."""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from shortcut_jax import checkpoint, cli, config_flag, data, metrics, run, versions, workdir_flag
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import image_sets, of_runs, reports, sample_files
from shortcut_jax.evaluation.grid import Cell, Grid, cells, check_grid
from shortcut_jax.evaluation.measuring import Evaluation
from shortcut_jax.evaluation.partial import digest_of
from shortcut_jax.files import write_atomically
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


# ---------------------------------------------------------------------- a trained model


def run_() -> None:
    """Samples from one checkpoint, measures, and writes results, pictures and samples."""
    preemption.heed_no_longer()
    setup, workdir, grid = _prepare()
    out = _sample_path("save_samples", FLAGS.save_samples) if FLAGS.save_samples else None
    sink = _sinks(setup, out, grid) if out else None
    step = _checkpoint_step(setup, workdir)
    if FLAGS.dry_run:
        _print_plan(setup, workdir, grid, step)
        return
    _check_writable(workdir, **({"save_samples": out.parent} if out else {}))
    _print_found(workdir, of_runs.evaluate_checkpoint(setup, workdir, step, grid, sink))


def sample() -> None:
    """Draws samples and measures nothing."""
    if not FLAGS.out:
        raise UserError("--out is missing; give an .npz file or a folder, e.g. --out=samples.npz.")
    out = _sample_path("out", FLAGS.out)
    quantise_as = config_flag.CONFIG.value.eval.to_dict()  # before the metrics are dropped
    config_flag.CONFIG.value.eval.metrics = ()
    preemption.heed_no_longer()
    setup, workdir, grid = _prepare()
    sink = _sinks(setup, out, grid, quantise_as)
    step = _checkpoint_step(setup, workdir)
    if FLAGS.dry_run:
        _print_plan(setup, workdir, grid, step)
        return
    _check_writable(workdir, out=out.parent)
    found = of_runs.evaluate_checkpoint(setup, workdir, step, grid, sink)
    reports.report(workdir, found)
    for cell in found.samples:
        print(f"samples   {_path_of(out, cell, list(found.samples))}")


def follow() -> None:
    """Evaluates checkpoints of a run as they appear, until the run has ended."""
    preemption.heed_no_longer()
    setup, workdir, grid = _prepare(wait=True)
    if FLAGS.dry_run:
        print(run.summary(setup))
        return
    _check_writable(workdir)
    evaluator = of_runs.RunEvaluator(setup, workdir, grid)
    followed = functools.partial(_followed, setup, workdir, grid)
    seen = time.monotonic()
    while True:
        ended = run.finished_step(workdir)  # before looking: what it names is there by now
        steps = [step for step in _steps(workdir) if not followed(step).exists()]
        # Others may have looked a moment later.
        ended, steps = distributed.gather([ended, steps])[0]
        for step in steps:
            try:
                found = evaluator.evaluate(step)
            except UserError:
                if step in _steps(workdir):
                    raise
                logging.info("Checkpoint %d was replaced by newer ones before it was read.", step)
                continue
            _print_found(workdir, found)
            if distributed.writes():
                write_atomically(followed(step), b"")
            seen = time.monotonic()
        if ended is not None:
            print(f"The run ended at step {ended}.")
            return
        if FLAGS.give_up_after and time.monotonic() - seen > FLAGS.give_up_after:
            raise UserError(
                f"--workdir={workdir} got no new checkpoint for {FLAGS.give_up_after:g} seconds, "
                "and the run has not ended; expected one: see whether it still trains, or raise "
                "--give_up_after."
            )
        time.sleep(FLAGS.poll_seconds)


def _prepare(wait: bool = False) -> tuple[run.Setup, str, Grid]:
    config, workdir = config_flag.CONFIG.value, workdir_flag.workdir()
    grid = Grid(
        tuple(_numbers("steps", int)),
        tuple(dict.fromkeys(FLAGS.params)),
        tuple(_numbers("cfg_scales", float)),
    )
    setup = run.prepare(config)
    check_grid(setup, grid)
    if wait and not FLAGS.dry_run:
        _await_run(workdir)
    run.check_workdir_for_evaluation(config, workdir)
    return setup, workdir, grid


def _await_run(workdir: str) -> None:
    begin = time.monotonic()
    while not (Path(workdir) / "config.json").exists():
        if FLAGS.give_up_after and time.monotonic() - begin > FLAGS.give_up_after:
            return  # what comes next says that there is no run
        time.sleep(FLAGS.poll_seconds)


def _numbers(name: str, kind: Callable[[str], Any]) -> list[Any]:
    texts: list[str] = getattr(FLAGS, name)
    try:
        found = [kind(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"--{name}={','.join(texts)} is not a list of numbers; expected them "
            f"separated by commas: give, for example, --{name}=1,4."
        ) from error
    return list(dict.fromkeys(found))


def _checkpoint_step(setup: run.Setup, workdir: str) -> int:
    keep = setup.config.checkpoint.keep
    step = checkpoint.Checkpoints(workdir, keep=keep, read_only=True).choose(FLAGS.step, "--step")
    distributed.agree({"checkpoint": step})
    return step


def _steps(workdir: str) -> list[int]:
    folder = Path(workdir) / "checkpoints"
    return (
        checkpoint.Checkpoints(workdir, keep=1, read_only=True).steps() if folder.exists() else []
    )


def _followed(setup: run.Setup, workdir: str, grid: Grid, step: int) -> Path:
    """Is there when `follow` has evaluated a checkpoint so."""
    asked = {"config": run.config_hash(setup.config), "ways": cells(setup, grid)}
    return Path(workdir) / "eval" / str(step) / f"followed_{digest_of(asked)}"


def _print_plan(setup: run.Setup, workdir: str, grid: Grid, step: int) -> None:
    print(run.summary(setup))
    print(f"checkpoint           {Path(workdir) / 'checkpoints' / str(step)}")
    print(f"sampling steps       {', '.join(map(str, grid.steps or setup.config.eval.steps))}")
    print(f"of the parameters    {', '.join(grid.params or (setup.config.eval.params,))}")


def _check_writable(workdir: str, **others: Path) -> None:
    """Of process 0, which writes; also the folders that other flags name."""
    with distributed.together():
        if distributed.writes():
            cli.check_writable("--workdir", Path(workdir) / "eval")
            for flag, folder in others.items():
                cli.check_writable(f"--{flag}", folder)


def _sample_path(flag: str, value: str) -> Path:
    """An .npz to write, or a folder (a name without a suffix)."""
    path = Path(value)
    if path.suffix not in (".npz", "") or (path.suffix and path.is_dir()) or not path.name:
        raise UserError(
            f"--{flag}={path} names neither an .npz file nor a folder; expected one to write: "
            f"give, for example, --{flag}=samples.npz."
        )
    return path


def _sinks(
    setup: run.Setup, out: Path, grid: Grid, section: Mapping[str, Any] | None = None
) -> sample_files.Sinks:
    """Files for the samples of each cell, quantised as the first metric is.

    Raises:
      UserError: a folder has other images.
    """
    rule, section = "round", section or setup.config.eval.to_dict()
    if section["metrics"]:
        extractor = metrics.find(section["metrics"][0]).extractor
        rule = metrics.protocols_of(extractor, section)[0].quantise
    ways = cells(setup, grid)
    kind = sample_files.Npz if out.suffix else sample_files.Pngs
    total = setup.config.eval.num_samples
    with distributed.together():
        if kind is sample_files.Pngs and distributed.writes():
            for cell in ways:
                sample_files.check_folder(_path_of(out, cell, ways), total)
    return lambda cell, identity: kind(_path_of(out, cell, ways), total, rule, identity)


def _path_of(out: Path, cell: Cell, ways: list[Cell]) -> Path:
    """NAME.npz; of several cells, with what tells this one from others: NAME_4.npz."""
    parts = [
        f"{value:g}" if isinstance(value, float) else str(value)
        for field, value in zip(cell._fields, cell, strict=True)
        if len({getattr(c, field) for c in ways}) > 1
    ]
    return out.with_name("_".join([out.stem, *parts]) + out.suffix)


def _print_found(workdir: str, found: Evaluation) -> None:
    folder = reports.report(workdir, found)
    if folder is None:
        return
    if found.records:
        print(reports.table(found.records), end="\n\n")
    print(f"samples   {folder / 'samples.png'}   rows: the same noise, columns: sampling steps")
    if found.records:
        print(f"curve     {folder / 'curve.png'}   against sampling steps")
        print(f"results   {folder.parent / 'results.jsonl'}   every number with its protocol")


# ---------------------------------------------------------------------- sets of images


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
    cli.check_writable("--out", out.parent)
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
        cli.check_writable("--out", Path(FLAGS.out).parent)
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
