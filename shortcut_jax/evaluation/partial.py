"""Long passes over samples: where a killed one goes on.

Summaries and the index of the next sample are stored between batches, so that a pass goes on with
the same bits as if it had never stopped.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.files import replacing
from shortcut_jax.metrics.references import read_npz

FOLDER = "partial"  # in eval/
# Storing takes no more than this share of the time: after a store of s seconds the next is made
# s / SHARE seconds later.
SHARE = 0.01


def digest_of(identity: Mapping[str, Any]) -> str:
    """16 hex digits that name what is JSON."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Partial:
    """Where a pass stands, in a file named after everything that decides its samples.

    Args:
      folder: for the file; None keeps nothing.
      identity: what decides the samples and their features, JSON.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = folder / f"{digest_of(identity)}.npz" if folder else None
        self._due = time.monotonic()

    def load(self) -> dict[str, NDArray[Any]]:
        """The arrays of the last `store`; {} if there is none."""
        if self._path is None or not self._path.exists():
            return {}
        return read_npz(self._path)

    def remove(self) -> None:
        """Removes what was stored."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def store(self, arrays: Mapping[str, NDArray[Any]], now: bool = False) -> None:
        """Writes the arrays, if it is time or must be `now`."""
        if self._path is None or not (now or time.monotonic() >= self._due):
            return
        begin = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        end = time.monotonic()
        self._due = end + (end - begin) / SHARE
