"""What the tests of consistency training and distillation share.

The networks of most tests are v(x, t, label) = a x + b t + e label: asking one at a wrong point,
time or label, or asking the wrong one, changes the answer. Labels number the images.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import rng
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.consistency_distillation import ConsistencyDistillation
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from tests import toys

N = 256
NULL = 10_000
SHAPE = (1, 1, 2)
EMA_COEFFICIENTS = (0.7, -1.3, 0, 0.001)
TEACHER_COEFFICIENTS = (-0.4, 0.9, 0, -0.002)

both_methods = pytest.mark.parametrize("method", [ConsistencyTraining, ConsistencyDistillation])


EMA = toys.linear_velocity(*EMA_COEFFICIENTS)
TEACHER = toys.linear_velocity(*TEACHER_COEFFICIENTS)


def unused(*args):
    raise AssertionError("this network is not asked for targets")


def make_batch(n=N, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(
    method,
    *,
    ema=EMA,
    teacher=None,
    stage=0,
    progress=None,
    batch=None,
    seed=0,
    index=0,
    **settings,
):
    """Targets with stages of one step each, and what is logged."""
    objective = method(null_label=NULL, **settings)
    if teacher is None:
        teacher = unused if method is ConsistencyTraining else TEACHER
    targets, scalars = objective.targets(
        rng.draws(seed, "train", index),
        batch or make_batch(),
        Velocities(unused, ema, teacher),
        progress or Progress(jnp.int32(stage), objective.num_stages),
    )
    return jax.tree.map(np.asarray, targets), scalars


def drawn_noise(method, **settings):
    """The noise of the first step in float64: images of zeros leave x_t = (1 - (1-f) t) x_0."""
    targets, _ = make_targets(method, batch=make_batch(scale=0.0), **settings)
    keep = 1 - settings.get("noise_floor", 0.0)
    return targets.x_t / toys.per_row(1 - keep * targets.t.astype(np.float64))


def spied(method, **settings):
    """Targets, the one call of the EMA and, with a teacher, the one of the teacher."""
    ema, teacher = toys.Spy(EMA), toys.Spy(TEACHER)
    targets, _ = make_targets(method, ema=ema, teacher=teacher, **settings)
    return targets, *ema.calls, *teacher.calls
