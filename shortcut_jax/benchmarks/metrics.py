"""What measuring costs: Inception's features beside torch-fidelity's where a Python that has it is
given, keeping account of them, and the Fréchet distance beside scipy's root of a matrix."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shortcut_jax import metrics
from shortcut_jax.benchmarks import Measurement, Options, summarize, timing
from shortcut_jax.benchmarks.peer import Peer, check_backend
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.metrics import fid, inception, inception_weights
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.frechet import frechet_distance
from shortcut_jax.metrics.protocols import INCEPTION, PLAIN
from shortcut_jax.metrics.summaries import Moments

BATCHES = 16


def measure(options: Options) -> Iterator[Measurement]:
    """Images and distances per second, weights and features drawn at random."""
    check_backend(options.torch_python)
    yield from features(options)
    yield from _distance(options)


def features(options: Options) -> Iterator[Measurement]:
    """Inception's features, and adding them up."""
    extractor = _extractor(options)
    side = 256 if extractor.image_shape[0] is None else extractor.image_shape[0]
    shape = (extractor.batch, side, side, extractor.image_shape[2])
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    contenders = {
        "features": lambda: timing.timed(lambda: len(extractor.outputs(images)["features"])),
        "moments": _moments(extractor.feature_dim, extractor.batch),
    }
    conditions: dict[str, Any] = {"extractor": extractor.name, "image_size": side}
    conditions["batch_size"] = extractor.batch
    with contextlib.ExitStack() as stack:
        if options.torch_python:
            peer = stack.enter_context(_peer(options.torch_python, shape))
            conditions |= peer.versions
            contenders["features/torch_fidelity"] = functools.partial(peer.run, "features")
        found = timing.rounds(contenders, options.repeats)
    for name, took in found.items():
        yield from timing.rates(f"metrics/{name}", took, "images", conditions)
    yield _share(found["moments"], found["features"], conditions)
    if options.torch_python:
        theirs = found["features/torch_fidelity"]
        name = "metrics/features: ours / torch_fidelity"
        yield timing.ratio(name, found["features"], theirs, conditions)


def _extractor(options: Options) -> Extractor:
    """Inception. It takes long to compile: in small, with nothing to compare, a classifier."""
    if options.small and not options.torch_python:
        return metrics.load_extractor("fd_digits", PLAIN, {})
    weights = inception_weights.load(inception.weight_shapes(), inception_weights.RANDOM)
    batch = 1 if options.small else fid.BATCH
    return fid.build_extractor(weights, INCEPTION["adm"], batch, jax.local_devices())


@contextlib.contextmanager
def _peer(python: str, shape: tuple[int, ...]) -> Iterator[Peer]:
    weights = inception_weights.load(inception.weight_shapes(), inception_weights.RANDOM)
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        path = Path(scratch) / "weights.npz"
        np.savez(path, **weights.arrays)  # type: ignore[arg-type]  # no array is an option
        arguments = {"weights": str(path), "image_size": shape[1], "batch_size": shape[0]}
        arguments |= {"threads": len(os.sched_getaffinity(0))}
        with Peer("torch_python", python, "torch_fidelity_features.py", arguments) as peer:
            yield peer


def _moments(width: int, batch: int) -> Callable[[], Took]:
    """Adds the features of BATCHES batches to those of the rounds before."""
    features = np.random.default_rng(0).random((batch, width), np.float32)
    moments = Moments()

    def work() -> int:
        for _ in range(BATCHES):
            moments.update(features)
        return BATCHES * batch

    return lambda: timing.timed(work)


def _share(moments: list[Took], features: list[Took], conditions: dict[str, Any]) -> Measurement:
    """Time that an image's features take to add, of the time they take to find."""
    # An accelerator works on features while no CPU does.
    kind = "cpu" if jax.default_backend() == "cpu" else "wall"

    def each(took: Took) -> float:
        return getattr(took, kind) / took.count

    shares = [each(a) / each(b) for a, b in zip(moments, features, strict=True)]
    return summarize("metrics/moments: share of features", shares, f"of {kind} time", conditions)


def _distance(options: Options) -> Iterator[Measurement]:
    width = 32 if options.small else inception.FEATURE_DIM
    a, b = (_statistics(width, seed) for seed in (0, 1))
    contenders = {
        "ours": lambda: timing.timed(lambda: bool(np.isfinite(frechet_distance(a, b)))),
        "scipy": lambda: timing.timed(lambda: bool(np.isfinite(_with_root_of_matrix(a, b)))),
    }
    ours, theirs = frechet_distance(a, b), _with_root_of_matrix(a, b)
    conditions = {"features": width, "relative_difference": abs(ours / theirs - 1)}
    found = timing.rounds(contenders, options.repeats)
    for name, took in found.items():
        yield from timing.rates(f"metrics/distance/{name}", took, "distances", conditions)
    yield timing.ratio("metrics/distance: ours / scipy", found["ours"], found["scipy"], conditions)


def _statistics(width: int, seed: int) -> Moments:
    """Of twice as many samples as features, whose deviations fall off as those of images do."""
    random = np.random.default_rng(seed)
    moments = Moments()
    moments.update(random.normal(size=(2 * width, width)) / np.sqrt(np.arange(1, width + 1)))
    return moments


def _with_root_of_matrix(a: Moments, b: Moments) -> float:
    """As the first FID code, pytorch-fid and ADM's evaluator find the distance."""
    from scipy import linalg

    difference = a.mean - b.mean
    cov_a, cov_b = a.cov, b.cov
    root = np.real(linalg.sqrtm(cov_a @ cov_b))
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))
