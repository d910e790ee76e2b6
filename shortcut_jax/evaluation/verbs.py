"""Verbs of the evaluation binary for a trained model; their flags are in `shortcut_jax.eval`."""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags, logging

from shortcut_jax import checkpoint, config_flag, metrics, run, workdir_flag
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import of_runs, reports, sample_files
from shortcut_jax.evaluation.grid import Cell, Grid, cells, check_grid
from shortcut_jax.evaluation.measuring import Evaluation
from shortcut_jax.evaluation.partial import digest_of
from shortcut_jax.files import check_writable, write_atomically
from shortcut_jax.parallel import distributed, preemption

FLAGS = flags.FLAGS


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
            check_writable("--workdir", Path(workdir) / "eval")
            for flag, folder in others.items():
                check_writable(f"--{flag}", folder)


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
