"""Fréchet distance between two sets of features, in float64 on the host.

The distance of two Gaussians (Dowson and Landau, 1982) with the mean and the covariance of the
features; with Inception features it is the FID of Heusel et al., https://arxiv.org/abs/1706.08500.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.summaries import Moments, check_same_width


@dataclasses.dataclass(frozen=True)
class Stats:
    """Mean [d] and covariance [d, d] of a set of features, for example read from a file."""

    mean: NDArray[np.float64]
    cov: NDArray[np.float64]


def frechet_distance(a: Moments | Stats, b: Moments | Stats, offset: float = 0.0) -> float:
    """|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^(1/2) C_b C_a^(1/2))^(1/2)), in float64.

    Singular covariances (fewer samples than features) are fine; the result is exact up to rounding,
    which may leave equal sets a hair below zero.

    Args:
        a, b: of the two sets.
        offset: added to the diagonals of both covariances in the third trace alone: a bias, for
            protocols that have it.

    Raises:
        UserError: a set has fewer than two samples, the feature dimensions differ, or a stored
            mean or covariance is malformed or not finite.
    """
    mean_a, cov_a = _checked(a)
    mean_b, cov_b = _checked(b)
    check_same_width(mean_a.size, mean_b.size)
    # C_a = F F^T. The eigenvalues of F^T C_b F are those of C_a^(1/2) C_b C_a^(1/2). Eigenvalues of
    # C_a at rounding level are left out of F: their square roots, and those of the rounding errors
    # they leave in the product, would be 1e-8 instead of 1e-16, once for every missing dimension.
    difference = mean_a - mean_b
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b)
    shift = offset * np.eye(mean_a.size)
    values, vectors = np.linalg.eigh(cov_a + shift)
    kept = values > values.max() * values.size * np.finfo(np.float64).eps
    factor = vectors[:, kept] * np.sqrt(values[kept])
    product = factor.T @ (cov_b + shift) @ factor
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def _checked(stats: Moments | Stats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, cov = np.asarray(stats.mean, np.float64), np.asarray(stats.cov, np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise UserError(
            f"Feature statistics have a mean of shape {mean.shape} and a covariance of shape "
            f"{cov.shape}; expected (d,) and (d, d): make the statistics again."
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(
            "Feature statistics contain NaN or infinite numbers; expected finite ones: make the "
            "statistics again."
        )
    return mean, (cov + cov.T) / 2
