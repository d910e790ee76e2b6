"""What the host does between steps, beside the steps of a v3-8 on latents; docs/host.md.

A stand-in for the devices sleeps as long as DiT-B/2 takes there for a batch of 256. Seconds of the
host's own thread, which gives the devices their work, count: what threads beside it do, they do
while the devices are busy.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shortcut_jax.benchmarks import Measurement, Options, latents, summarize
from shortcut_jax.clock import Clock
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset
from shortcut_jax.logs import MetricLogger
from shortcut_jax.parallel import sharding

BATCH_SIZE = 256
MOMENTS = (32, 32, 8)  # mean and log variance of latents of 256x256 images
STEP = 4.9e12 / (0.4 * 61.5e12)  # FLOPs of a step per core over 40% of the peak of a v3's core
LOG_EVERY = 100  # the default
LOGGED = 20  # lines of a round
SCALARS = 30  # numbers of the trainer in a line


def measure(options: Options) -> Iterator[Measurement]:
    """Waiting for data with batches made ahead and without, and writing the log."""
    steps, step = (3, 0.02) if options.small else (20, STEP)
    moments = (4, 4, 8) if options.small else MOMENTS
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        cache = latents.make_cache(Path(scratch) / "cache", 4 * BATCH_SIZE, moments, BATCH_SIZE)
        for name, threads in (("made ahead", 2), ("made when asked for", 0)):
            found = [_data(cache, steps, step, threads) for _ in range(options.repeats)]
            yield from _shares(f"host/latents/{name}", found, step)
        logged = [_log(Path(scratch) / str(i)) / LOGGED / LOG_EVERY for i in range(options.repeats)]
        yield from _shares("host/log", logged, step)


def _shares(name: str, seconds: list[float], step: float) -> Iterator[Measurement]:
    conditions = {"batch_size": BATCH_SIZE, "seconds of a step": step}
    yield summarize(name, [1000 * s for s in seconds], "ms / step", conditions)
    yield summarize(name, [100 * s / step for s in seconds], "% of a step", conditions)


def _data(cache: Dataset, steps: int, step: float, threads: int) -> float:
    """Seconds in which the trainer's thread has a batch made and placed, per step."""
    rows = sharding.batch_sharding(sharding.local_mesh())
    spent = 0.0
    with pipeline.batches(
        cache, batch_size=BATCH_SIZE, seed=0, start_step=0, num_steps=steps + 1, flip=True,
        num_threads=threads,
    ) as batches:  # fmt: skip
        sharding.to_global(next(batches), rows)  # what starts the threads is of no step
        for _ in range(steps):
            time.sleep(step)
            begin = time.perf_counter()
            sharding.to_global(next(batches), rows)
            spent += time.perf_counter() - begin
    return spent / steps


def _log(workdir: Path) -> float:
    """Seconds of writing LOGGED lines as the trainer does, TensorBoard included."""
    clock = Clock(BATCH_SIZE, 10**6, 8)
    values = {f"scalar/{i}": i / 7 for i in range(SCALARS)}
    with MetricLogger(workdir, 10**6, tensorboard=True, write=True, restart_step=None) as logger:
        logger.scalars(0, values, clock.tick(0))  # opens the files
        begin = time.perf_counter()
        for line in range(1, LOGGED + 1):
            logger.scalars(line * LOG_EVERY, values, clock.tick(line * LOG_EVERY))
        return time.perf_counter() - begin
