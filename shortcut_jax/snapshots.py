"""Snapshots of power-function EMAs, and those of other widths reconstructed from them.

WORKDIR/snapshots/STEP has what `TrainState.averages` has of `averages.power`. Unlike checkpoints
they are kept for the whole run: Karras et al. 2024 (section 3.2, https://arxiv.org/abs/2312.02696)
show that sums of them come close to the average of any other width, at any step they reach.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from shortcut_jax import averages
from shortcut_jax.averages import Profile
from shortcut_jax.checkpoint import Checkpoints

FOLDER = "snapshots"
GROUP_BYTES = 2**28  # what is read of a snapshot at a time


class Snapshots:
    """What training writes: nothing, where no power function is tracked.

    Args:
      workdir: of the run.
      section: `config.averages`.
      restart_step: the step that training goes on from. Later snapshots are those of a process that
        died; they are removed, and written again.
    """

    def __init__(self, workdir: str | os.PathLike[str], section: ConfigDict, restart_step: int):
        every = section.snapshot_every
        self._every = every if section.power else 0
        self._store = Checkpoints(workdir, keep=None, folder=FOLDER) if self._every else None
        dropped = self._store.drop_after(restart_step) if self._store else []
        if dropped:
            logging.info("Dropped the snapshots %s, which are made again.", dropped)

    def due(self, step: int) -> bool:
        """Whether there is a snapshot at that step."""
        return self._every > 0 and step % self._every == 0

    def save(self, step: int, tracked: Mapping[str, Any]) -> None:
        """Writes the power functions among the tracked averages, if it is time for that.

        They are on disk when this returns: a checkpoint that is saved next never has fewer
        snapshots before it than the run that goes on from it needs.
        """
        if self._store is not None and self.due(step):
            kept = {k: v for k, v in tracked.items() if averages.width(k) is not None}
            self._store.save(step, {"averages": kept}, {})
            self._store.wait()

    def close(self) -> None:
        """Releases the folder."""
        if self._store is not None:
            self._store.close()


# ---------------------------------------------------------------------- after training


class Fit(NamedTuple):
    """An average as a sum of stored ones."""

    target: Profile
    sources: Sequence[Profile]
    weights: np.ndarray  # [len(sources)] float64
    error: float  # see `averages.combine`


def folder(checkpoints: Checkpoints) -> Path:
    """Where the run of these checkpoints has its snapshots."""
    return checkpoints.directory.parent / FOLDER


def steps_before(checkpoints: Checkpoints, step: int) -> list[int]:
    """The snapshots of steps before a checkpoint."""
    if not folder(checkpoints).is_dir():
        return []
    return [found for found in _open(checkpoints).steps() if found < step]


def fit(target: Profile, stored: Sequence[int], widths: Sequence[float]) -> Fit:
    """The sum of averages of these widths closest to the target.

    Args:
      target: at the step of a checkpoint, whose own averages take part.
      stored: steps of the snapshots.
      widths: of the power functions that the run tracks.
    """
    sources = [Profile(step, width) for step in (*stored, target.step) for width in widths]
    return Fit(target, sources, *averages.combine(target, sources))


def reconstruct(checkpoints: Checkpoints, found: Fit, shapes: Any) -> Any:
    """The parameters that a fit stands for, on their devices.

    One group of arrays after the other is summed up over all sources, so that there is never more
    than the result and twice GROUP_BYTES (or the largest array).

    Args:
      checkpoints: of the run.
      found: from `fit`.
      shapes: tree of jax.ShapeDtypeStruct with shardings, all nested dicts.

    Raises:
      UserError: a snapshot cannot be read as these shapes.
    """
    snapshots, flat = _open(checkpoints), flatten_dict(shapes)
    result: dict[Any, Any] = {}
    for group in _groups(flat):
        part = unflatten_dict({key: flat[key] for key in group})
        total = None
        for source, weight in zip(found.sources, found.weights, strict=True):
            store = checkpoints if source.step == found.target.step else snapshots
            name = f"{averages.POWER}{source.width!r}"
            term = store.restore(source.step, {"averages": {name: part}})["averages"][name]
            total = jax.tree.map(jnp.zeros_like, term) if total is None else total
            total = _add(total, term, np.float32(weight))
        result |= flatten_dict(total)
    logging.info(
        "Reconstructed power_%r at step %d from %d averages of widths %s; its profile is met with "
        "a relative error of %.2g.",
        found.target.width,
        found.target.step,
        len(found.sources),
        ", ".join(sorted({repr(source.width) for source in found.sources})),
        found.error,
    )
    return unflatten_dict(result)


@jax.jit(donate_argnums=0)
def _add(total: Any, term: Any, weight: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a + weight * b, total, term)


def _groups(flat: Mapping[Any, jax.ShapeDtypeStruct]) -> Iterator[list[Any]]:
    """The keys in their order, in groups of no more than GROUP_BYTES or one array."""
    group: list[Any] = []
    size = 0
    for key, array in flat.items():
        nbytes = array.size * array.dtype.itemsize
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += nbytes
    yield group


def _open(checkpoints: Checkpoints) -> Checkpoints:
    workdir = checkpoints.directory.parent
    return Checkpoints(workdir, keep=None, read_only=True, folder=FOLDER)
