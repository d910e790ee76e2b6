"""Small data and checks that the tests of several objectives share."""

import jax.numpy as jnp
import numpy as np

from shortcut_jax.objectives import Batch, Targets


def per_row(a):
    """Scalars [n] that broadcast over images."""
    return a[:, None, None, None]


def make_batch(n: int, shape: tuple[int, int, int], scale: float = 1.0) -> Batch:
    """Normal images of the shape, the same in every call, with labels 0 ... n-1."""
    images = scale * np.random.default_rng(0).normal(size=(n, *shape))
    return Batch(jnp.asarray(images, jnp.float32), jnp.arange(n, dtype=jnp.int32))


def linear_velocity(a: float, b: float, c: float, e: float):
    """The network a x + b t + c d + e label."""
    return lambda x, t, d, labels: a * x + per_row(b * t + c * d + e * labels)


class Spy:
    """A network that notes what it was asked."""

    def __init__(self, velocity):
        self.velocity = velocity
        self.calls = []

    def __call__(self, x, t, d, labels):
        self.calls.append([np.asarray(a) for a in (x, t, d, labels)])
        return self.velocity(x, t, d, labels)


def assert_fields(targets: Targets, n: int, shape: tuple[int, int, int]) -> None:
    """Shapes and types of all fields, and rows of equal weight."""
    assert targets.x_t.shape == targets.target.shape == (n, *shape)
    for name in ("t", "d", "weight", "labels", "branch"):
        assert getattr(targets, name).shape == (n,)
    floats = (targets.x_t, targets.target, targets.t, targets.d, targets.weight)
    assert {a.dtype.name for a in floats} == {"float32"}
    assert targets.labels.dtype == targets.branch.dtype == np.int32
    assert (targets.weight == 1).all()
