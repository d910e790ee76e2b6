"""Batches of a data set as a pure function of the seed and the step.

Row r of step s is element k = s * batch_size + r of one endless sequence: position k % N in the
permutation of the N rows that belongs to epoch k // N. Which image that is depends neither on the
number of processes nor on where a run was interrupted: the only state to save is the step.
"""

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from shortcut_jax.closing import Closing
from shortcut_jax.data.sources import Dataset
from shortcut_jax.data.workers import Workers

Batch = dict[str, np.ndarray]


class Batches(Closing, Iterator[dict[str, Any]]):
    """The batches of a run in order; `close` (or leaving its `with`) ends threads and processes."""

    def __init__(self, iterator: grain.DatasetIterator[Batch], workers: Workers | None) -> None:
        self._iterator, self._workers = iterator, workers

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def close(self) -> None:
        """Stops making batches."""
        self._iterator.close()
        if self._workers is not None:
            self._workers.close()


def random_bits(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """Draws uint64 [count] from the Philox generator of (seed, stream, index).

    numpy keeps this raw output the same in every version, which it does not promise of
    `Generator.permutation` and its like.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of the rows in an epoch: int64 [size], each of 0..size-1 once."""
    return np.argsort(random_bits(seed, "epoch", epoch, size), kind="stable")


def flips(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Returns which rows of a global batch are mirrored: bool [batch_size], each with odds 1/2."""
    return random_bits(seed, "flip", step, batch_size) % 2 == 1


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 -1..1; what is no uint8 stays as it is."""
    if images.dtype != np.uint8:
        return images
    # One array, not three: a batch of photographs is large, and new memory has to be zeroed.
    found = np.divide(images, np.float32(127.5))
    found -= 1
    return found


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    rows: np.ndarray | None = None,
    flip: bool = False,
    num_threads: int = 2,
    prefetch: int = 8,
    num_workers: int = 0,
) -> Batches:
    """Iterates over this process's rows of the batches start_step .. start_step + num_steps - 1.

    What row k of a global batch is does not depend on who asks for it. Batches are made ahead of
    time in threads; `close()` stops them early.

    With worker processes a thread has its rows read by one of them, so order and values are those
    of threads alone. (grain's own `mp_prefetch` deals steps to processes too, but its processes
    outlive a killed main process, and it wants absl's flags parsed.)

    Args:
      batch_size: rows of the global batch.
      rows: which of them, ascending [b], e.g. `sharding.own_rows`; None for all.
      flip: mirror each row left-right with probability 1/2; samples never are, as the noise that
        they were made from leads to them as they are.
      num_threads: threads that make batches; 0 makes each when it is asked for.
      prefetch: batches made ahead; at least one per worker process.
      num_workers: processes that read and decode; 0 reads in the threads. Others than 0 need a data
        set whose `read` can be pickled.

    Returns:
      Iterator of {"image": float32 [b, H, W, C], pixels in -1..1, "label": int32 [b]}, and whatever
      else the data set has.

    `next` raises what reading raises, in a worker process too.
    """
    owned = np.arange(batch_size) if rows is None else rows
    flip = flip and dataset.holds != "samples"
    epoch_order = _cached_order(seed, dataset.size)
    workers = None
    if num_workers:
        workers = Workers(dataset.read, num_workers, "data.workers")
        dataset = dataclasses.replace(dataset, read=workers)
        # A thread for each process, which it keeps busy.
        num_threads, prefetch = max(num_threads, num_workers), max(prefetch, num_workers)

    def make_batch(step: int) -> Batch:
        indices = _row_indices(step * batch_size + owned, dataset.size, epoch_order)
        mirrored = flips(seed, step, batch_size)[owned] if flip else np.zeros(len(owned), bool)
        if dataset.has_mirrors:
            return dataset.rows(indices + dataset.size * mirrored)
        found = dict(dataset.rows(indices))
        image = to_float(found.pop("image"))
        for row in np.flatnonzero(mirrored):  # one by one, for the same reason
            image[row] = image[row, :, ::-1]
        return {"image": image, **found}

    steps = grain.MapDataset.range(start_step, start_step + num_steps).map(make_batch)
    return Batches(iter(steps.to_iter_dataset(grain.ReadOptions(num_threads, prefetch))), workers)


@contextlib.contextmanager
def reading(dataset: Dataset, num_workers: int) -> Iterator[Dataset]:
    """The same data set, read by worker processes that end with the `with`; by none if 0."""
    if not num_workers:
        yield dataset
        return
    workers = Workers(dataset.read, num_workers, "data.workers")
    try:
        yield dataclasses.replace(dataset, read=workers)
    finally:
        workers.close()


def in_order(
    dataset: Dataset, first: int, last: int, batch_size: int, num_threads: int = 2
) -> grain.DatasetIterator[Batch]:
    """The rows first .. last - 1 as `Dataset.rows` gives them, `batch_size` at a time.

    The last batch may be smaller. `num_threads` batches are read ahead, each in a thread.
    """

    def read(begin: int) -> Batch:
        return dataset.rows(np.arange(begin, min(begin + batch_size, last)))

    starts = grain.MapDataset.range(first, last, batch_size).map(read)
    return iter(starts.to_iter_dataset(grain.ReadOptions(num_threads, num_threads)))


def _row_indices(
    sequence: np.ndarray, size: int, epoch_order: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Maps ascending sequence indices k [n] to rows of the data set [n]; may span epochs."""
    epochs, positions = np.divmod(sequence, size)
    indices = np.empty_like(positions)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = epoch_order(epoch)[positions[here]]
    return indices


def _cached_order(seed: int, size: int) -> Callable[[int], np.ndarray]:
    """`permutation` of the last two epochs, which are all that neighbouring batches need."""
    cached = functools.lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, size))
    lock = threading.Lock()  # One thread sorts while the others wait, instead of all sorting.

    def order(epoch: int) -> np.ndarray:
        with lock:
            return cached(epoch)

    return order
