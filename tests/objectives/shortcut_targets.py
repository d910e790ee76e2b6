"""What the tests of shortcut targets share: a closed form of velocities, and numpy in float64.

The velocity of most tests is s(x, t, d, label) = a x + b t + c d + e label: asking the network at a
wrong point, time, size or label, or asking the wrong network, changes the answer. Labels number the
images, so that they tell which image a row is made of.

Most tests run operation by operation and share the shapes of 256 rows, a quarter of which
bootstrap: compiling is what takes time here, and every operation is compiled once.
"""

import fractions
import functools

import jax
import numpy as np

from shortcut_jax import rng
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.shortcut import Shortcut
from tests import toys

N = 256
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)
AUTHORS = dict(Shortcut.authors_code)
SAMPLINGS = ("random", "systematic", "stratified")


def make_objective(**changes):
    return Shortcut(null_label=NULL, **{"class_dropout": 0.0, **changes})


ONLINE = toys.linear_velocity(-0.5, 0.3, 1.1, -0.001)
EMA = toys.linear_velocity(0.7, -1.3, 0.9, 0.001)


def make_batch(n=N, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(objective, batch=None, *, online=ONLINE, ema=EMA, num_shards=1, seed=0, index=0):
    draw = rng.draws(seed, "train", index)
    velocities = Velocities(online, ema)
    targets, _ = objective.targets(draw, batch or make_batch(), velocities, PROGRESS, num_shards)
    return jax.tree.map(np.asarray, targets)


def compiled_targets(objective, batch):
    """Like make_targets, for shapes no other test has: compiled as a whole, in less time."""
    cheaply = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=cheaply)
    def run(batch):
        return objective.targets(
            rng.draws(0, "train", 0), batch, Velocities(ONLINE, EMA), PROGRESS
        )[0]

    return jax.tree.map(np.asarray, run(batch))


@functools.cache
def sixteen_steps(objective, *, scale=1.0):
    """The rows of 16 steps: 1,024 that bootstrap and 3,072 that do not."""
    batch = make_batch(scale=scale)
    steps = [make_targets(objective, batch, index=index) for index in range(16)]
    return jax.tree.map(lambda *a: np.concatenate(a), *steps)


def bootstrap_rows(objective, n=N):
    """Mask of the rows that bootstrap: the first p of every q."""
    share = fractions.Fraction(objective.bootstrap_fraction).limit_denominator(64)
    return np.arange(n) % share.denominator < share.numerator


def spied_half_steps(**changes):
    """Targets, the mask of the rows that bootstrap, and the two calls they made."""
    objective, spy = make_objective(**changes), toys.Spy(EMA)
    targets = make_targets(objective, ema=spy)
    first, second = spy.calls
    return targets, bootstrap_rows(objective), first, second


def chi_square(counts):
    """Of counts that should be equal."""
    expected = np.sum(counts) / len(counts)
    return np.sum((counts - expected) ** 2) / expected


def reference_target(objective, targets, coefficients):
    """The target of every row in float64, as if it were a bootstrap row of its size."""
    a, b, c, e = coefficients
    clip, w = objective.bootstrap_clip or np.inf, objective.cfg_scale
    x, t = targets.x_t.astype(np.float64), targets.t.astype(np.float64)
    half = targets.d.astype(np.float64) / 2
    smallest = half == 1 / objective.denoise_timesteps

    def ask(x, t):
        def network(label):
            return a * x + toys.per_row(b * t + c * np.where(smallest, 0, half) + e * label)

        conditional, unconditional = network(targets.labels), network(np.array([NULL]))
        guided = unconditional + w * (conditional - unconditional)
        guides = smallest & (objective.bootstrap_cfg and w not in (0, 1))
        return np.where(toys.per_row(guides), guided, conditional)

    s1 = ask(x, t)
    s2 = ask(np.clip(x + toys.per_row(half) * s1, -clip, clip), t + half)
    return np.clip((s1 + s2) / 2, -clip, clip)
