"""Improved precision and recall of Kynkäänniemi et al., https://arxiv.org/abs/1904.06991.

The manifold of a set is the union of balls around its rows. The ball of a row reaches to its k-th
nearest other row of the set, and what is on its boundary is inside. Precision is the share of
samples on the manifold of the reference, recall the share of the reference on that of the samples.

This is the definition of the paper, of torch-fidelity (`prc`) and of ADM's evaluator. They differ
in rounding: torch-fidelity takes |u|^2 - 2 u.v + |v|^2 in the precision of the features, ADM in
float16 unless that overflows, here it is float64. The formula leaves rounding noise where rows are
equal; here their distance is 0. So copies are neighbours at distance 0: a row with k copies in its
own set has a ball of radius 0, which covers its copies in the other set and nothing else, and a
sample that is a copy of a reference image is always covered.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.summaries import Rows, check_same_width

BLOCK = 2048  # rows and columns of the largest matrix of distances there is at a time


def precision(
    samples: Rows, reference: Rows, k: int = 3, radii: NDArray[np.float64] | None = None
) -> float:
    """Share of the samples that are on the manifold of the reference.

    Args:
        samples, reference: features.
        k: neighbours that a ball reaches to.
        radii: `squared_radii(reference, k)`, if known already. They take most of the time, and a
            reference is often compared with several sets of samples.

    Raises:
        UserError: the reference has fewer than k + 1 rows, there are no samples, or the sets have
            different numbers of features.
        ValueError: rows are missing.
    """
    check_same_width(samples.rows.shape[1], reference.rows.shape[1])
    if not len(samples.rows):
        raise UserError("There are no images to measure: expected 1 or more, use more images.")
    if radii is None:
        radii = squared_radii(reference, k)
    return float(_covered(_Points.of(samples), _Points.of(reference), radii).mean())


def recall(
    samples: Rows, reference: Rows, k: int = 3, radii: NDArray[np.float64] | None = None
) -> float:
    """Share of the reference that is on the manifold of the samples.

    As `precision` with the two sets exchanged; `radii` are `squared_radii(samples, k)`.
    """
    return precision(reference, samples, k, radii)


def squared_radii(rows: Rows, k: int = 3) -> NDArray[np.float64]:
    """Squared distance [n] of each row to its k-th nearest other row.

    Raises:
        UserError: fewer than k + 1 rows.
        ValueError: rows are missing.
    """
    if not 1 <= k < len(rows.rows):
        raise UserError(
            f"Precision and recall with {k} neighbours cannot be made of {len(rows.rows)} images; "
            f"expected at least 1 neighbour and {max(k, 1) + 1} images: use more images, or "
            "another number of neighbours."
        )
    points = _Points.of(rows)
    nearest = np.full((len(points), k + 1), np.inf)  # with the row itself, which is at 0
    blocks = list(_blocks(len(points)))
    for i, block in enumerate(blocks):
        for other in blocks[i:]:
            distances = _squared_distances(points[block], points[other])
            nearest[block] = _smallest(nearest[block], distances)
            if other != block:
                nearest[other] = _smallest(nearest[other], distances.T)
    return nearest.max(axis=1)


@dataclasses.dataclass(frozen=True)
class _Points:
    """Rows [n, d] of a set, their squared norms, and digests that are equal where rows are."""

    rows: NDArray[np.float32]
    norms: NDArray[np.float64]
    digests: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Rows) -> "_Points":
        x = rows.rows
        norms = [np.einsum("nd,nd->n", x[b], x[b], dtype=np.float64) for b in _blocks(len(x))]
        # + 0 makes 0 of -0, which is equal but has other bits.
        digests = b"".join(hashlib.blake2b(row + 0, digest_size=8).digest() for row in x)
        return cls(x, np.concatenate(norms), np.frombuffer(digests, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | NDArray[np.int64]) -> "_Points":
        return _Points(self.rows[which], self.norms[which], self.digests[which])


def _covered(points: _Points, centres: _Points, radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each point is in a ball [n]."""
    covered = np.zeros(len(points), np.bool_)
    for block in _blocks(len(centres)):
        left = np.flatnonzero(~covered)
        for some in _blocks(len(left)):
            distances = _squared_distances(points[left[some]], centres[block])
            covered[left[some]] = (distances <= radii[block]).any(axis=1)
    return covered


def _squared_distances(a: _Points, b: _Points) -> NDArray[np.float64]:
    """[len(a), len(b)], exact to about 1e-15 of the squared norms, and 0 where rows are equal."""
    found = a.rows.astype(np.float64) @ b.rows.astype(np.float64).T
    found *= -2
    found += a.norms[:, None]
    found += b.norms
    np.maximum(found, 0, out=found)
    found[a.digests[:, None] == b.digests] = 0
    return found


def _smallest(found: NDArray[np.float64], more: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest of both in each row, as many as were found [n, m]."""
    count = found.shape[1]
    return np.partition(np.concatenate([found, more], axis=1), count - 1, axis=1)[:, :count]


def _blocks(count: int) -> Iterator[slice]:
    for first in range(0, count, BLOCK):
        yield slice(first, min(first + BLOCK, count))
