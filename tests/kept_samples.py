"""All samples of an evaluation in memory, for tests."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.evaluation import grid
from shortcut_jax.sampling import to_uint8


@dataclasses.dataclass
class Kept:
    """A sink; `images` and `labels` are whole after the evaluation."""

    path: Path = Path("memory")
    resumes: bool = False
    batches: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def write(self, first, images, labels):
        assert first == sum(len(labels) for _, labels in self.batches)
        self.batches.append((to_uint8(images), labels))

    def close(self):
        pass

    def stamp(self):
        return 0

    @property
    def images(self):
        return np.concatenate([images for images, _ in self.batches])

    @property
    def labels(self):
        return np.concatenate([labels for _, labels in self.batches])


def by_steps():
    """Number of sampling steps -> sink, and the function that an evaluation takes."""
    kept: dict[int, Kept] = {}

    def sink(cell: grid.Cell, identity: Mapping[str, Any]) -> Kept:
        return kept.setdefault(cell.num_steps, Kept())

    return kept, sink
