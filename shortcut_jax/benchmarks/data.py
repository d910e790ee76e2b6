"""The input pipeline: photographs, beside tf.data where a Python that has it is given; latents."""

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.benchmarks import Measurement, Options, latents, timing
from shortcut_jax.benchmarks.peer import Peer
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.data import crops, image_files, open_dataset, pipeline, preparing
from shortcut_jax.data.sources import Dataset

METHODS = {"accurate": "INTEGER_ACCURATE", "fast": "INTEGER_FAST"}  # of TensorFlow's decoder


def measure(options: Options) -> Iterator[Measurement]:
    """Images and latent records per second, from files to batches."""
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        yield from _photographs(options, Path(scratch))
        yield from latents.measure(options, Path(scratch))


def _photographs(options: Options, scratch: Path) -> Iterator[Measurement]:
    count, shape, size, batch_size = (8, (50, 37), 16, 4) if options.small else (
        256, (500, 375), 256, 64
    )  # fmt: skip
    jpegs = write_jpegs(scratch / "jpegs", count, shape)
    _prepare(jpegs, scratch)
    datasets = {crop: _open(scratch, crop, size) for crop in crops.CROPS}
    encoded = [path.read_bytes() for path in sorted(jpegs.rglob("*.jpg"))]
    conditions: dict[str, Any] = {
        "images": count,
        "source": f"{shape[0]}x{shape[1]}, JPEG quality 90",
        "mean_bytes": int(np.mean([len(data) for data in encoded])),
        "image_size": size,
        "batch_size": batch_size,
    }
    contenders: dict[str, Callable[[], Took]] = {
        "decode": lambda: timing.timed(lambda: sum(bool(crops.decode(data)) for data in encoded))
    }
    for crop, dataset in datasets.items():
        contenders[crop] = functools.partial(_pass_over, dataset, batch_size)
    with contextlib.ExitStack() as stack:
        if options.tf_python:
            arguments = {"jpegs": str(jpegs), "image_size": size}
            arguments |= {"batch_size": batch_size, "count": count}
            peer = Peer("tf_python", options.tf_python, "tf_data.py", arguments)
            stack.enter_context(peer)
            conditions |= peer.versions
            for crop in crops.CROPS:
                for short, method in METHODS.items():
                    run = functools.partial(peer.run, f"{crop}/{method}")
                    contenders[f"{crop}/tf_data_{short}"] = run
        found = timing.rounds(contenders, options.repeats)
    for name, took in found.items():
        yield from timing.rates(f"data/jpeg/{name}", took, "images", conditions)
    for crop in crops.CROPS if options.tf_python else ():
        for short in METHODS:
            theirs = found[f"{crop}/tf_data_{short}"]
            name = f"data/jpeg/{crop}: ours / tf_data_{short}"
            yield timing.ratio(name, found[crop], theirs, conditions)
    # One is enough to see that it runs: each takes seconds to start.
    workers = 1 if options.small else len(os.sched_getaffinity(0))
    for crop, dataset in datasets.items():
        took = _with_workers(dataset, batch_size, workers, options.repeats)
        with_workers = conditions | {"workers": workers}
        yield from timing.rates(f"data/jpeg/{crop}/workers", took, "images", with_workers)


def write_jpegs(folder: Path, count: int, shape: tuple[int, int]) -> Path:
    """Writes `count` different photographs of `shape` (width, height), as JPEGs.

    They are cuts of the two photographs that scikit-learn ships, of different sizes, resized.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    random = np.random.default_rng(0)
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    inside = folder / "all"  # one class
    inside.mkdir(parents=True)
    for i in range(count):
        whole = Image.fromarray(photographs[i % 2])  # 640x427
        height = int(whole.height * random.uniform(0.6, 1))
        width = height * shape[0] // shape[1]
        left, top = (int(random.integers(0, side)) for side in
                     (whole.width - width + 1, whole.height - height + 1))  # fmt: skip
        part = whole.crop((left, top, left + width, top + height))
        part.resize(shape, Image.Resampling.BICUBIC).save(inside / f"{i:05d}.jpg", quality=90)
    return folder


def _prepare(jpegs: Path, scratch: Path) -> None:
    request = preparing.Request(
        source=image_files.Source(jpegs, ""), name="photographs", split="train", data_dir=scratch
    )
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        preparing.prepare(request)


def _open(data_dir: Path, crop: str, size: int) -> Dataset:
    section = {
        "name": "images", "builder": "photographs", "split": "train", "data_dir": str(data_dir),
        "image_size": size, "crop": crop, "num_classes": 1, "workers": 0,
    }  # fmt: skip
    return open_dataset(section)


def _pass_over(dataset: Dataset, batch_size: int) -> Took:
    """One epoch, made in one thread; all of its work is in the time, none of another epoch's."""

    def work() -> int:
        steps = dataset.size // batch_size
        with pipeline.batches(
            dataset, batch_size=batch_size, seed=0, start_step=0, num_steps=steps, flip=True,
            num_threads=1,
        ) as batches:  # fmt: skip
            return sum(len(batch["label"]) for batch in batches)

    return timing.timed(work)


def _with_workers(dataset: Dataset, batch_size: int, workers: int, repeats: int) -> list[Took]:
    """Epochs read without a pause, after one to warm up, so that no batch is made ahead of time."""
    steps = dataset.size // batch_size
    with pipeline.batches(
        dataset, batch_size=batch_size, seed=0, start_step=0, num_steps=(repeats + 3) * steps,
        flip=True, prefetch=2, num_workers=workers,
    ) as batches:  # fmt: skip

        def epoch() -> int:
            return sum(len(next(batches)["label"]) for _ in range(steps))

        epoch()
        return [timing.timed_with_children(epoch) for _ in range(repeats)]
