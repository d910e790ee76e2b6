"""Running summaries of one output of a feature extractor: what metrics need of a set of images.

The same class summarises samples and the data set they are compared with. A summary takes batches
in the order of the images. It can be stored between two batches (`arrays`) and goes on from there
(`from_arrays`) with the same bits as if it had never stopped.
"""

from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shortcut_jax.errors import UserError

Arrays = dict[str, NDArray]


class Summary(Protocol):
    """What every summary is."""

    @property
    def n(self) -> int:
        """Images so far."""

    def update(self, values: ArrayLike) -> None:
        """Adds the rows [b, d] of the next b >= 0 images.

        Raises:
            UserError: a number is NaN or infinite.
            ValueError: not a matrix, d is not that of the batches before, or more than expected.
        """

    def arrays(self) -> Arrays:
        """Everything that `from_arrays` needs; later updates do not change it."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        """A summary that goes on where the other one stood."""


class Moments:
    """Running mean and covariance, float64, for Fréchet distances.

    The result does not depend on how the samples are cut into batches (1e-12 relative), and adding
    a sample costs the same however many came before.
    """

    def __init__(self) -> None:
        self.n = 0
        # Sums are taken of x - shift. Raw sums of x x^T lose the covariance when the mean is large
        # compared to the spread, because cov = E[x x^T] - mean mean^T subtracts near-equal numbers.
        self._shift = np.zeros(0)
        self._sum = np.zeros(0)
        self._outer_sum = np.zeros((0, 0))

    def update(self, values: ArrayLike) -> None:
        """Adds a batch [b, d]; see `Summary`."""
        x = _checked(values, np.float64, self._shift.size if self.n else None)
        if not len(x):
            return
        if not self.n:
            self._shift = x.mean(axis=0)
            self._sum = np.zeros(x.shape[1])
            self._outer_sum = np.zeros((x.shape[1], x.shape[1]))
        x = x - self._shift
        self.n += len(x)
        self._sum += x.sum(axis=0)
        self._outer_sum += x.T @ x

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean [d] of the samples. Raises UserError for fewer than two samples."""
        self._require_two()
        return self._shift + self._sum / self.n

    @property
    def cov(self) -> NDArray[np.float64]:
        """Unbiased covariance [d, d] (divisor n - 1). Raises UserError below two samples."""
        self._require_two()
        return (self._outer_sum - np.outer(self._sum, self._sum) / self.n) / (self.n - 1)

    def arrays(self) -> Arrays:
        """See `Summary`."""
        return {
            "n": np.asarray(self.n),
            "shift": self._shift.copy(),
            "sum": self._sum.copy(),
            "outer_sum": self._outer_sum.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        """See `Summary`."""
        moments = cls()
        moments.n = int(arrays["n"])
        moments._shift = arrays["shift"].copy()
        moments._sum = arrays["sum"].copy()
        moments._outer_sum = arrays["outer_sum"].copy()
        return moments

    def _require_two(self) -> None:
        if self.n < 2:
            raise UserError(
                f"A Fréchet distance needs the covariance of at least 2 samples, got {self.n}: "
                "raise the number of samples."
            )


class Rows:
    """The rows themselves, float32, for metrics of pairs of images: KID, precision, recall.

    Takes the memory of the rows it keeps and of one batch.

    Args:
        total: rows that will come.
        limit: keep no more than these; which ones is drawn without replacement and a function of
            `total` and `limit` alone, the same in every version of numpy. None keeps all.
    """

    def __init__(self, total: int, limit: int | None = None) -> None:
        if total < 0 or (limit is not None and limit < 1):
            raise ValueError(f"expected total >= 0 and limit >= 1, got {total} and {limit}")
        self.n = 0
        self.total = total
        self.limit = total if limit is None else min(limit, total)
        self._keep = _drawn(total, self.limit)
        self._rows = np.zeros((0, 0), np.float32)

    def update(self, values: ArrayLike) -> None:
        """Adds a batch [b, d]; see `Summary`."""
        x = _checked(values, np.float32, self._rows.shape[1] if self.n else None)
        _check_room(self.n + len(x), self.total)
        if not len(x):
            return
        if not self.n:
            self._rows = np.empty((self.limit, x.shape[1]), np.float32)
        kept = x[self._keep[self.n : self.n + len(x)]]
        first = self._kept
        self._rows[first : first + len(kept)] = kept
        self.n += len(x)

    @property
    def rows(self) -> NDArray[np.float32]:
        """The rows kept [min(total, limit), d], in the order they came.

        Raises ValueError before all rows have come.
        """
        _check_complete(self.n, self.total)
        return self._rows

    def arrays(self) -> Arrays:
        """See `Summary`. The rows are not copied."""
        return {
            "n": np.asarray(self.n),
            "total": np.asarray(self.total),
            "limit": np.asarray(self.limit),
            "rows": self._rows[: self._kept],  # no update writes there again
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        """See `Summary`. If they are all there, the rows are not copied."""
        rows = cls(int(arrays["total"]))
        rows.limit = int(arrays["limit"])
        rows._keep = _drawn(rows.total, rows.limit)
        rows.n = int(arrays["n"])
        rows._rows = there = arrays["rows"]
        if len(there) < rows.limit:
            rows._rows = np.empty((rows.limit, there.shape[1]), np.float32)
            rows._rows[: len(there)] = there
        return rows

    @property
    def _kept(self) -> int:
        return int(np.count_nonzero(self._keep[: self.n]))


class Marginals:
    """Sums over the class probabilities of logits, float64, for the Inception score.

    The samples are cut into consecutive splits; split i is samples i * total // splits up to, not
    including, (i + 1) * total // splits. torch-fidelity does so with samples_shuffle=False, and
    ADM's evaluator, whose splits have 5,000 samples each, if `total` is `splits` times 5,000.

    Args:
        total: samples that will come.
        splits: 1 to total.

    Raises:
        UserError: fewer samples than splits.
    """

    def __init__(self, total: int, splits: int = 10) -> None:
        if not 1 <= splits <= total:
            raise UserError(
                f"An Inception score of {total} samples in {splits} splits leaves a split empty; "
                "expected 1 split or more, of 1 sample or more each: raise the number of samples."
            )
        self.n = 0
        self.total = total
        self.splits = splits
        # Of the samples of each split: sum of p [splits, classes], sum of p log p [splits].
        self._p = np.zeros((splits, 0))
        self._p_log_p = np.zeros(splits)

    def update(self, values: ArrayLike) -> None:
        """Adds a batch of logits [b, classes]; see `Summary`."""
        x = _checked(values, np.float64, self._p.shape[1] if self.n else None)
        _check_room(self.n + len(x), self.total)
        if not len(x):
            return
        if not self.n:
            self._p = np.zeros((self.splits, x.shape[1]))
        log_p = x - x.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        p_log_p = (p * log_p).sum(axis=1)
        bounds = self.bounds
        for split in range(self.splits):
            first, last = np.clip(bounds[split : split + 2] - self.n, 0, len(x))
            self._p[split] += p[first:last].sum(axis=0)
            self._p_log_p[split] += p_log_p[first:last].sum()
        self.n += len(x)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """First sample of each split, and `total` [splits + 1]."""
        return np.arange(self.splits + 1, dtype=np.int64) * self.total // self.splits

    @property
    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean over each split of p [splits, classes] and of sum(p log p) [splits].

        Raises ValueError before all samples have come.
        """
        _check_complete(self.n, self.total)
        counts = np.diff(self.bounds)
        return self._p / counts[:, None], self._p_log_p / counts

    def arrays(self) -> Arrays:
        """See `Summary`."""
        return {
            "n": np.asarray(self.n),
            "total": np.asarray(self.total),
            "p": self._p.copy(),
            "p_log_p": self._p_log_p.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> Self:
        """See `Summary`."""
        marginals = cls(int(arrays["total"]), len(arrays["p"]))
        marginals.n = int(arrays["n"])
        marginals._p = arrays["p"].copy()
        marginals._p_log_p = arrays["p_log_p"].copy()
        return marginals


def check_same_width(a: int, b: int) -> None:
    """Raises UserError unless two sets have equally many features per image."""
    if a != b:
        raise UserError(
            f"The two sets have {a} and {b} features per sample, expected equal numbers: make both "
            "with the same feature extractor."
        )


def _checked(values: ArrayLike, dtype: type[np.floating], width: int | None) -> NDArray:
    """The batch [b, d] as `dtype`; raises what `Summary.update` says."""
    x = np.asarray(values, dtype)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(f"features must be [n, {'d' if width is None else width}], got {x.shape}")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        raise UserError(
            f"{bad} of {len(x)} samples in a batch have NaN or infinite features; expected finite "
            "numbers: check the model that made the images for divergence."
        )
    return x


def _check_room(count: int, total: int) -> None:
    if count > total:
        raise ValueError(f"expected {total} samples in all, got {count}")


def _check_complete(count: int, total: int) -> None:
    if count < total:
        raise ValueError(f"expected {total} samples, only {count} have come")


def _drawn(total: int, count: int) -> NDArray[np.bool_]:
    """Mask [total] of `count` places, drawn without replacement."""
    # Raw bits of a bit generator are fixed by numpy's compatibility policy; draws of its
    # distributions are not.
    keys = np.random.Philox(key=0).random_raw(total)
    mask = np.zeros(total, np.bool_)
    mask[np.argsort(keys, kind="stable")[:count]] = True
    return mask
