"""The kernel Inception distance of Binkowski et al., https://arxiv.org/abs/1801.01401."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.summaries import Rows, check_same_width


def kid(
    samples: Rows, reference: Rows, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of random subsets, unbiased, kernel (x.y / d + 1)^3.

    The estimate does not depend on the number of images, so that few images give a noisy value but
    not a larger one; between equal distributions it is around 0, and often below. The subsets are
    those that torch-fidelity draws by default from as many rows (it works in the precision of the
    features, here it is float64). A `Rows` with a limit has drawn once before.

    Args:
        samples, reference: features; which is which makes another draw, not another distance.
        subsets: how many pairs of subsets are drawn.
        subset_size: rows in each, without replacement.
        seed: of the draws.

    Returns:
        Mean over the pairs and their standard deviation with divisor `subsets`.

    Raises:
        UserError: a set has fewer rows than a subset, which torch-fidelity refuses too, or the sets
            have different numbers of features.
        ValueError: rows are missing.
    """
    x, y = samples.rows, reference.rows
    check_same_width(x.shape[1], y.shape[1])
    for rows, what in ((x, "samples"), (y, "reference images")):
        if len(rows) < subset_size:
            raise UserError(
                f"A KID with subsets of {subset_size} images cannot be made of {len(rows)} {what}; "
                f"expected {subset_size} or more: use more images, or smaller subsets."
            )
    # The legacy generator: its numbers are the same in every version of numpy.
    random = np.random.RandomState(seed)
    found = np.zeros(subsets)
    for i in range(subsets):
        of_x = random.choice(len(x), subset_size, replace=False)
        of_y = random.choice(len(y), subset_size, replace=False)
        found[i] = squared_mmd(x[of_x], y[of_y])
    return float(found.mean()), float(found.std())


def squared_mmd(x: ArrayLike, y: ArrayLike) -> float:
    """Unbiased estimate from x [m, d] and y [n, d], m and n at least 2.

    Pairs of a row with itself do not count within a set.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(_mean_within(x) + _mean_within(y) - 2 * _kernel(x, y).mean())


def _mean_within(x: NDArray[np.float64]) -> float:
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    affine = x @ y.T / x.shape[1] + 1
    return affine * affine * affine  # quicker than a power
