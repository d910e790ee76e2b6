"""What an evaluation found, as files: results.jsonl, pictures, a table and a plot."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from shortcut_jax import pictures
from shortcut_jax.evaluation.measuring import Evaluation
from shortcut_jax.evaluation.partial import FOLDER
from shortcut_jax.files import write_atomically
from shortcut_jax.logs import MetricLogger
from shortcut_jax.metrics.protocols import PLAIN

RESULTS = "results.jsonl"


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
    write_records(folder.parent / RESULTS, found.records)
    shutil.rmtree(folder.parent / FOLDER / str(found.step), ignore_errors=True)
    with contextlib.suppress(OSError):  # there are those of other steps, or none
        (folder.parent / FOLDER).rmdir()
    grids = write_pictures(folder, found)
    if found.records:
        points: dict[str, list[tuple[int, float]]] = {}
        for record in found.records:
            line = points.setdefault(row_name(record, found.records), [])
            line.append((record["sampling_steps"], record["value"]))
        pictures.curve(points, folder / "curve.png", "value", f"step {found.step:,}")
    for record in found.records:
        logging.info(
            "%s at step %d, %d sampling steps, %d samples: %.4f",
            row_name(record, found.records),
            *(record[k] for k in ("step", "sampling_steps", "num_samples", "value")),
        )
    if logger is not None:
        logger.scalars(
            found.step,
            {
                f"eval/{metric_name(r)}/{r['sampling_steps']}_steps": r["value"]
                for r in found.records
            },
        )
        logger.image(found.step, "samples", grids[0])
    return folder


def write_pictures(folder: Path, found: Evaluation) -> list[Any]:
    """One grid for each kind of parameters and guidance: samples.png, samples_ONLINE_1.5.png ..."""
    grids: dict[str, dict[int, Any]] = {}
    first = next(iter(found.samples))
    for cell, images in found.samples.items():
        other = (cell.params, cell.cfg_scale) != (first.params, first.cfg_scale)
        name = f"samples_{cell.params}_{cell.cfg_scale:g}" if other else "samples"
        grids.setdefault(name, {})[cell.num_steps] = images
    rows = min(map(len, found.samples.values()))
    return [
        pictures.sample_grid(samples, folder / f"{name}.png", rows=rows)
        for name, samples in grids.items()
    ]


def metric_name(record: Mapping[str, Any]) -> str:
    """The metric and its protocol, where there are several: numbers of two are never mixed."""
    protocol = record.get("protocol", PLAIN.name)  # older records have none
    return record["metric"] + ("" if protocol == PLAIN.name else f" ({protocol})")


def row_name(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The metric, and what tells a record from others of a table but the number of steps."""

    def varies(key: str) -> bool:
        return len({r[key] for r in records}) > 1

    parts = [metric_name(record)]
    parts += [record["params"]] if varies("params") else []
    parts += [f"cfg={record['cfg_scale']:g}"] if varies("cfg_scale") else []
    return " ".join(parts)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each metric, protocol, kind of parameters and guidance; a column for each number of
    sampling steps."""
    columns = sorted({r["sampling_steps"] for r in records})
    values = {(row_name(r, records), r["sampling_steps"]): f"{r['value']:.3f}" for r in records}
    names = list(dict.fromkeys(name for name, _ in values))
    width, column = max(map(len, names)), max(9, *(len(value) + 2 for value in values.values()))
    lines = [" " * width + "".join(f"{n:>{column}}" for n in columns) + "   sampling steps"]
    for name in names:
        cells = (values.get((name, n), "") for n in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def read_records(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a workdir so far."""
    path = Path(workdir) / "eval" / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds records to a file of JSON lines, each in the place of one of the same protocol."""

    def protocol(record):
        return {k: v for k, v in record.items() if k not in ("value", "std")}

    # The training run and an evaluation that follows it may write at the same time.
    with _locked(path.parent):
        old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        new = [protocol(record) for record in records]
        lines = [r for r in old if protocol(r) not in new] + list(records)
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in lines).encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine out that lock the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks it
