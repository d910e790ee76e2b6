"""What steps and samplers are timed with, made in no time: no number is zero or like its neighbour.

Devices may take less power, and go faster, where products vanish, as those of a fresh network do.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import run
from shortcut_jax.objectives import Batch
from shortcut_jax.parallel import sharding
from shortcut_jax.program import Program
from shortcut_jax.state import TrainState

WEIGHTS = 0.02  # standard deviation


def uniform(shape: Sequence[int], deviation: float) -> jax.Array:
    """Float32 numbers of mean 0, mixed from their places.

    (`jax.random` has every one of a hundred arrays compiled for a tenth of a second.)
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + np.uint32(1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's last step
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) / 2.0**31
    return (deviation * math.sqrt(3)) * signed.reshape(shape)


def params(shapes: Any) -> Any:
    """Parameters of these shapes."""
    return jax.tree.map(lambda a: uniform(a.shape, WEIGHTS), shapes)


def train_state(program: Program) -> TrainState:
    """A train state whose averages have just begun, on the devices of the program."""

    def init() -> TrainState:
        shape = program.state_shape
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        return dataclasses.replace(zeros, params=params(shape.params), ema=params(shape.ema))

    return jax.jit(init, out_shardings=program.state_sharding)()


def batch(program: Program, setup: run.Setup) -> Batch:
    """What the step is given, images and latents of variance 1, on the devices of the program."""
    shape = program.batch_shape

    @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(setup.mesh))
    def draw() -> Batch:
        image = uniform(shape.image.shape, 1.0)
        label = jnp.arange(shape.label.size, dtype=jnp.int32) % setup.num_classes
        return Batch(image, label, None if shape.noise is None else image[::-1])

    return draw()
