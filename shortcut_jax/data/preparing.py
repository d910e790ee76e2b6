"""Prepares one split of an image set: listing, labels, shards, report, manifest, metadata."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

from shortcut_jax.data import image_files, shards
from shortcut_jax.data.images import MANIFEST
from shortcut_jax.data.workers import Workers
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable, write_atomically

Manifest = dict[str, Any]

ZIP_FILES = 8_000_000  # in the lists that all workers keep of a zip: 0.6 KB each, 4.5 GiB in all


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      source: the images.
      name, split: of the set, as TFDS names them.
      data_dir: folder of prepared sets.
      labels: "folders", "none" or a labels file (`image_files.classes_from_file`), on disk or in
        the source.
      counts: how many images there may be; () for any number.
      workers: processes; 0 for none, None for `default_workers`.
      skip_corrupt: leave out images that cannot be decoded, instead of stopping at the end.
    """

    source: image_files.Source
    name: str
    split: str
    data_dir: Path
    labels: str = "folders"
    counts: tuple[int, ...] = ()
    workers: int | None = 0
    skip_corrupt: bool = False

    @property
    def directory(self) -> Path:
        return self.data_dir / self.name / shards.VERSION


def prepare(request: Request) -> None:
    """Prepares a split, or finishes what a killed process began.

    Raises:
      UserError: something is in the way; before anything is written where it can be known.
    """
    _check_request(request)
    entries, others = request.source.images()
    listed = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items()) or "none"
    print(f"{len(entries):,} images; other files, ignored: {listed}.", flush=True)
    _check_count(request, len(entries))
    if request.workers is None:
        workers = default_workers(request.source.kind, len(entries) + sum(others.values()))
        request = dataclasses.replace(request, workers=workers)
    check_writable("--data_dir", request.directory)
    with _only_process(request.directory):
        manifest = _read_manifest(request)
        class_names, labels = _find_labels(request, [entry.path for entry in entries], manifest)
        plan = shards.plan(entries, labels)
        target = shards.Target(
            request.directory, request.name, request.split, class_names, len(plan)
        )
        listing = _digest([shard.key(class_names) for shard in plan])
        if request.split not in manifest["splits"]:
            records = _make_shards(target, request, plan)
            _report_corrupt(request, records, len(entries))
            split = _describe_split(request, records, others) | {"listing": listing}
            manifest["classes"] = list(class_names)
            manifest["splits"][request.split] = split
            write_atomically(request.directory / MANIFEST, json.dumps(manifest, indent=1).encode())
        elif manifest["splits"][request.split]["listing"] != listing:
            raise UserError(
                f"{request.directory} has a split {request.split} of other files or labels; "
                "expected a new one: choose another --name or --split, or remove that folder."
            )
        _finish(target, manifest)  # again if it is there already: a kill may have come before
    print(
        f"{request.directory}: {manifest['splits'][request.split]['images']:,} images of "
        f"{len(class_names):,} class(es) in split {request.split}. Use them with data.name=images "
        f"data.builder={request.name} data.split={request.split} "
        f"data.num_classes={len(class_names)}."
    )


def default_workers(kind: str, num_files: int) -> int:
    """One for each CPU, but of a zip no more than share ZIP_FILES: each keeps its list of files.

    Args:
      kind: of the source.
      num_files: in it, images or not.
    """
    cpus = os.cpu_count() or 1
    return cpus if kind == "folder" else max(1, min(cpus, ZIP_FILES // max(1, num_files)))


def _check_request(request: Request) -> None:
    for flag, value in (("name", request.name), ("split", request.split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
            raise UserError(
                f"--{flag}={value} is not a name that TFDS takes; expected small letters, digits "
                "and _, beginning with a letter: choose another."
            )
    if request.workers is not None and request.workers < 0:
        raise UserError(
            f"--workers={request.workers} is out of range; expected 0 or more: change it."
        )


def _check_count(request: Request, found: int) -> None:
    if request.counts and found not in request.counts:
        raise UserError(
            f"--source={request.source.path} has {found:,} images for split {request.split}; "
            f"expected {' or '.join(f'{count:,}' for count in request.counts)}: get what is "
            "missing, name the folder that is meant with --inside=FOLDER, or leave out --count or "
            "--preset."
        )


def _find_labels(
    request: Request, paths: Sequence[str], manifest: Manifest
) -> tuple[tuple[str, ...], list[int]]:
    """Class names in the order of their labels, and the label of each image.

    Another split of the set decides the order if there is one.
    """
    if request.labels == "none":
        found = ["images"] * len(paths)
    elif request.labels == "folders":
        found = image_files.classes_from_folders(paths)
    else:
        where = f"--labels={request.labels}"
        found = image_files.classes_from_file(_labels_text(request), where, paths)
    names = manifest["classes"] or image_files.class_order(set(found))
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(
            f"--split={request.split} has {len(unknown)} classes that the other splits of "
            f"{request.name} lack (the first: {unknown[0]}); expected the same classes: prepare "
            "the split with all of them first, or choose another --name."
        )
    index = {name: label for label, name in enumerate(names)}
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    print(f"{len(names):,} class(es): {shown}.", flush=True)
    return tuple(names), [index[name] for name in found]


def _labels_text(request: Request) -> str:
    try:
        if Path(request.labels).is_file():
            return Path(request.labels).read_text()
        return request.source.open().read(request.labels, inside=False).decode()
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--labels={request.labels} cannot be read on disk or in {request.source.path} "
            f"({error}); expected folders, none, or a JSON or CSV file: mend the path."
        ) from error


def _make_shards(
    target: shards.Target, request: Request, plan: Sequence[shards.Shard]
) -> list[dict[str, Any]]:
    """Writes the shards that are missing and returns the records of all, in order."""
    from tqdm import tqdm

    target.progress.mkdir(exist_ok=True)
    records = {}
    for shard in plan:
        record = target.finished(shard)
        if record is not None:
            records[shard.index] = record
    missing = [shard for shard in plan if shard.index not in records]
    total = sum(len(shard.entries) for shard in plan)
    done = total - sum(len(shard.entries) for shard in missing)
    every = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
    with tqdm(total=total, initial=done, unit="image", mininterval=every) as bar:
        for shard, record in _write_all(target, request, missing):
            records[shard.index] = record
            bar.update(len(shard.entries))
    return [records[shard.index] for shard in plan]


def _write_all(
    target: shards.Target, request: Request, missing: Sequence[shards.Shard]
) -> Iterator[tuple[shards.Shard, dict[str, Any]]]:
    """Writes shards and yields each with its record, when it is done."""
    if not request.workers or not missing:
        yield from ((shard, target.write(request.source, shard)) for shard in missing)
        return
    pool = Workers(target.write, min(request.workers, len(missing)), "--workers")
    try:
        waiting = {pool.submit(request.source, shard): shard for shard in missing}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), pool.result(future)
    finally:
        pool.close()


def _report_corrupt(request: Request, records: Sequence[dict[str, Any]], total: int) -> None:
    """Lists images that cannot be decoded in a file; a UserError unless they are to be left out."""
    path = request.directory / f"corrupt-{request.split}.txt"
    corrupt = [pair for record in records for pair in record["corrupt"]]
    if not corrupt:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, "".join(f"{name}\t{why}\n" for name, why in corrupt).encode())
    said = (
        f"{len(corrupt):,} of {total:,} images cannot be decoded (all in {path}, the first: "
        f"{corrupt[0][0]}: {corrupt[0][1]})"
    )
    if not request.skip_corrupt or len(corrupt) == total:
        raise UserError(
            f"{said}; expected none: replace those files and run the same command again, or leave "
            "them out with --on_corrupt=skip."
        )
    print(f"{said}; left out.")


def _describe_split(
    request: Request, records: Sequence[dict[str, Any]], others: dict[str, int]
) -> Manifest:
    files = [file for record in records for file in record["files"]]
    return {
        "source": str(request.source.path.absolute()),
        "inside": request.source.inside,
        "kind": request.source.kind,
        "labels": request.labels,
        "images": len(files),
        "corrupt": [path for record in records for path, _ in record["corrupt"]],
        "not_images": others,
        "digest": _digest(files),  # of (path, label, size, sha256) in order
        "shard_lengths": [record["count"] for record in records],
        "num_bytes": sum(record["num_bytes"] for record in records),
    }


def _read_manifest(request: Request) -> Manifest:
    path = request.directory / MANIFEST
    if not path.exists():
        if (request.directory / "dataset_info.json").exists():
            raise UserError(
                f"{request.directory} holds a set that this command did not make; expected a new "
                "name: choose another --name or --data_dir."
            )
        return {"name": request.name, "classes": [], "splits": {}}
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected what this command wrote: restore it, or "
            "choose another --name."
        ) from error


def _finish(target: shards.Target, manifest: Manifest) -> None:
    splits = {
        name: (split["shard_lengths"], split["num_bytes"])
        for name, split in manifest["splits"].items()
    }
    sources = ", ".join(split["source"] for split in manifest["splits"].values())
    shards.write_metadata(target, splits, f"Prepared by shortcut_jax.prepare from {sources}.")
    # What a killed process, or one that listed other files, has left.
    written = {target.shard_path(index) for index in range(target.num_shards)}
    for path in target.directory.glob(f"{target.name}-{target.split}.array_record-*"):
        if path not in written:
            path.unlink()
    shutil.rmtree(target.progress, ignore_errors=True)


@contextlib.contextmanager
def _only_process(directory: Path) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process; a UserError if another has it."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another process is preparing {directory}; expected to be the only one: wait "
                "until it is done."
            ) from error
        yield


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
