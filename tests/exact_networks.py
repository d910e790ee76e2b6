"""What perfectly trained networks answer, of a mixture of Gaussians whose flow is exact.

Tolerances. The truth is float64 Runge-Kutta of 128 substeps, within 1e-7. The same shortcut as a
network (`shortcut`: float32, 40 substeps) is within 1e-5 of it by its method, and rounding adds
less: what a few of its answers make up must be within EXACT. Random checks are in standard errors
and allow 4.5, which one of 150,000 right ones exceeds; their draws are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import rng
from shortcut_jax.objectives import Batch, Progress, Velocities
from shortcut_jax.objectives.flow_matching import FlowMatching
from shortcut_jax.objectives.shortcut import Shortcut
from tests import gaussian_mixture as truth

NULL = 1
M = 128
EXACT = 2e-5
STANDARD_ERRORS = 4.5
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
FLOW = FlowMatching(null_label=NULL)
SHORTCUT = Shortcut(null_label=NULL)
# But for the share of rows, with whose shapes no other test would share compiled operations.
AUTHORS = {**Shortcut.authors_code, "bootstrap_fraction": 0.25}


@jax.jit
def shortcut(x, t, d, labels=None):
    """The exact shortcut; d = 0 asks for the exact velocity."""
    return truth.average_velocity(x, t, d, 40, loop=jax.lax.fori_loop)


@jax.jit
def jax_velocity(x, t, d=None, labels=None):
    return truth.velocity(x, t)


def shortcut_over_1_128(x, t, d, labels):
    """The exact shortcut of a network that takes d = 0 for the smallest step."""
    return shortcut(x, t, jnp.where(d == 0, 1 / M, d))


def to_the_end(x, t, d, labels):
    """The exact consistency function, x + (1 - t) v = X_{t->1}(x)."""
    return shortcut(x, t, 1 - t)


def exact_noise(x, t, d, labels):
    """E[x_0 | x] at diffusion's level s = 1000 (1 - t) - 1."""
    alpha_bar = jnp.asarray(ALPHA_BAR, jnp.float32)[jnp.round(1000 * (1 - t)).astype(int) - 1]
    return truth.posterior_means(x, jnp.sqrt(1 - alpha_bar), jnp.sqrt(alpha_bar))[0]


def variance_preserving(t):
    alpha_bar = ALPHA_BAR[np.rint(1000 * (1 - t)).astype(int) - 1]
    return np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar), 1.0, 0.0


def unused(*args):
    raise AssertionError("no network is asked here")


def zero(x, t, d, labels):
    return jnp.zeros_like(x)


def make_targets(objective, n, *, online=unused, ema=unused, teacher=unused, stage=0, stages=1):
    batch = Batch(jnp.asarray(truth.sample(n), jnp.float32), jnp.zeros(n, jnp.int32))
    draw, velocities = rng.draws(0, "train", 0), Velocities(online, ema, teacher)
    targets, _ = objective.targets(draw, batch, velocities, Progress(jnp.int32(stage), stages))
    return batch, jax.tree.map(np.asarray, targets)


def rms(error):
    return np.sqrt(np.mean(error**2))


def order(step_counts, errors):
    """p of error = C / n^p, between neighbours."""
    return -np.diff(np.log(errors)) / np.diff(np.log(step_counts))


def euler(x, num_steps):
    """Euler's method in float64."""
    for i in range(num_steps):
        x = x + truth.velocity(x, np.full(len(x), i / num_steps)) / num_steps
    return x
