"""A data distribution whose flow is known: a mixture of Gaussians, seen through straight lines.

With x_1 from the mixture and x_0 ~ N(0, I), the point x = a x_0 + b x_1 is from a mixture of
N(b m_k, a^2 I + b^2 S_k), and Gaussian conditioning gives E[x_0 | x] and E[x_1 | x] exactly. All
velocities follow from these two.

Every function takes images x [B, 1, 1, 2] and times [B], as numpy arrays (then in float64: the
truth) or as jax arrays (then in float32: what a perfectly trained network would answer).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from shortcut_jax.objectives.base import rows

Array = Any  # np.ndarray or jax.Array

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-1.5, -0.5], [1.2, -1.0], [0.5, 1.5]])
COVARIANCES = np.array(
    [[[0.40, 0.10], [0.10, 0.35]], [[0.30, -0.05], [-0.05, 0.50]], [[0.35, 0.0], [0.0, 0.30]]]
)
VARIANCES, AXES = np.linalg.eigh(COVARIANCES)  # S_k = AXES_k diag(VARIANCES_k) AXES_k^T
ALL_AXES = np.concatenate(AXES, axis=1)  # [2, 2 K]: x @ ALL_AXES is x on the axes of all S_k
MEANS_ON_AXES = np.einsum("ki,kij->kj", MEANS, AXES).ravel()
FREQUENCIES = np.array([[1.0, 0.0], [0.0, 1.5], [1.0, -1.0], [2.0, 1.0]])


def sample(n: int, seed: int = 0) -> np.ndarray:
    """Data [n, 1, 1, 2]."""
    rng = np.random.default_rng(seed)
    k = rng.choice(len(WEIGHTS), n, p=WEIGHTS)
    z = np.sqrt(VARIANCES[k]) * rng.normal(size=(n, 2))
    return (MEANS[k] + (AXES[k] * z[:, None]).sum(-1))[:, None, None]


def noise(n: int, seed: int = 0) -> np.ndarray:
    """N(0, I) [n, 1, 1, 2]."""
    return np.random.default_rng(seed).normal(size=(n, 1, 1, 2))


def posterior_means(x: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """E[x_0 | x] and E[x_1 | x] for x = a x_0 + b x_1; a and b [B]."""
    xp = x.__array_namespace__()
    a, b = rows(a), rows(b)
    by_component = (*x.shape[:-1], len(WEIGHTS), 2)
    variance = a[..., None] ** 2 + b[..., None] ** 2 * VARIANCES
    residual = (x @ ALL_AXES - b * MEANS_ON_AXES).reshape(by_component)
    precise = residual / variance
    log_density = np.log(WEIGHTS) - 0.5 * (residual * precise + xp.log(variance)).sum(-1)
    density = xp.exp(log_density - log_density.max(-1, keepdims=True))
    posterior = density / density.sum(-1, keepdims=True)  # P(k | x)
    weighted = posterior[..., None] * precise
    x0 = a * (weighted.reshape(*x.shape[:-1], -1) @ ALL_AXES.T)
    x1 = posterior @ MEANS + b * ((VARIANCES * weighted).reshape(*x.shape[:-1], -1) @ ALL_AXES.T)
    return x0, x1


def velocity(x: Array, t: Array, d: Array = None, labels: Array = None) -> Array:
    """v(x, t) = E[x_1 - x_0 | x_t = x] of the straight path, where noise is at t = 0."""
    x0, x1 = posterior_means(x, 1 - t, t)
    return x1 - x0


def serial(start: int, stop: int, body: Callable[[int, Any], Any], value: Any) -> Any:
    """jax.lax.fori_loop in Python."""
    for i in range(start, stop):
        value = body(i, value)
    return value


def average_velocity(
    x: Array,
    t: Array,
    d: Array,
    substeps: int,
    field: Callable[[Array, Array], Array] = velocity,
    loop: Callable[..., Any] = serial,
) -> Array:
    """s(x, t, d) = (X_{t->t+d}(x) - x) / d, where X solves dx/dt = field(x, t).

    By the classical Runge-Kutta method. The average is summed rather than divided by d afterwards,
    so that small d cost no accuracy and d = 0 gives field(x, t).
    """
    h = d / substeps

    def body(i, s):  # s: the sum of the slopes of the first i of the substeps, over their number
        here, now = x + rows(d) * s, t + i * h
        k1 = field(here, now)
        k2 = field(here + rows(h) / 2 * k1, now + h / 2)
        k3 = field(here + rows(h) / 2 * k2, now + h / 2)
        k4 = field(here + rows(h) * k3, now + h)
        return s + (k1 + 2 * k2 + 2 * k3 + k4) / (6 * substeps)

    return loop(0, substeps, body, x * 0)


def float64(a: Array) -> Array:
    """A numpy array of it."""
    return np.asarray(a, np.float64)


def exact_shortcut(x: Array, t: Array, d: Array, substeps: int = 128) -> np.ndarray:
    """s(x, t, d) in float64, of images, times and sizes of any type."""
    return average_velocity(float64(x), float64(t), float64(d), substeps)


def exact_end(x: Array, t: Array | float = 0.0, substeps: int = 128) -> np.ndarray:
    """X_{t->1}(x) in float64."""
    x, t = float64(x), float64(t) + np.zeros(len(x))
    return x + rows(1 - t) * exact_shortcut(x, t, 1 - t, substeps)


def exact_end_of_diffusion(x: Array, alpha_bar: float, substeps: int = 128) -> np.ndarray:
    """Where the probability-flow ODE of x = sqrt(alpha_bar) x_1 + sqrt(1 - alpha_bar) x_0 ends.

    On the circle x = sin(u) x_1 + cos(u) x_0 from the u of `alpha_bar` to u = pi/2, in float64.
    """

    def field(x, u):
        x0, x1 = posterior_means(x, np.cos(u), np.sin(u))
        return rows(np.cos(u)) * x1 - rows(np.sin(u)) * x0

    x, u = float64(x), float64(np.arcsin(np.sqrt(alpha_bar))) + np.zeros(len(x))
    d = np.pi / 2 - u
    return x + rows(d) * average_velocity(x, u, d, substeps, field)


def z_scores(x: Array) -> np.ndarray:
    """How many standard errors the moments of samples [n, 1, 1, 2] are from those of the mixture.

    Means, second moments, and cosines and sines of `FREQUENCIES`, whose expectations the
    characteristic function gives: a Gaussian of the right mean and covariance fails these.
    """
    x = float64(x).reshape(-1, 2)
    phase = x @ FREQUENCIES.T
    features = np.stack(
        [*x.T, *(x**2).T, x[:, 0] * x[:, 1], *np.cos(phase).T, *np.sin(phase).T], axis=1
    )
    second = np.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None])
    waves = np.exp(
        1j * FREQUENCIES @ MEANS.T
        - 0.5 * np.einsum("fi,kij,fj->fk", FREQUENCIES, COVARIANCES, FREQUENCIES)
    )
    wave = waves @ WEIGHTS
    expected = [*(WEIGHTS @ MEANS), *second.diagonal(), second[0, 1], *wave.real, *wave.imag]
    return (features.mean(0) - expected) / (features.std(0) / np.sqrt(len(x)))
