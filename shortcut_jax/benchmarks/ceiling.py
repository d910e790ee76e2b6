"""What the devices can do at most: products of large square matrices, in a step's type."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shortcut_jax.benchmarks import Measurement, summarize, timing
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.parallel import sharding

SIDES = {"cpu": (1024, 2048), "other": (4096, 8192, 16384)}
SMALL_SIDES = (512,)
PREFIX = "ceiling/"


def contenders(
    dtype: jnp.dtype, mesh: Mesh, repeats: int, small: bool = False
) -> dict[str, Callable[[], Took]]:
    """ "ceiling/SIDE" -> a turn, whose pieces of work are FLOPs over all devices.

    Every device multiplies two matrices of its own, `repeats` times for the largest side and as
    much work for the others.

    Args:
      dtype: of both matrices and of their product.
      mesh: the devices.
      repeats: products of the largest side in a turn.
      small: one small side, to see that it runs.
    """
    platform = sharding.platform(mesh)
    sides = SMALL_SIDES if small else SIDES.get(platform, SIDES["other"])
    return {
        f"{PREFIX}{side}": _turn(dtype, mesh, side, repeats * (max(sides) // side) ** 3)
        for side in sides
    }


def best(found: Mapping[str, list[Took]], kind: str = "wall") -> list[float]:
    """FLOPs per second by round: of the sides' the best.

    Args:
      found: from `timing.rounds`.
      kind: of seconds, "wall" or "cpu".
    """
    rates = [
        [took.count / getattr(took, kind) for took in rounds]
        for name, rounds in found.items()
        if name.startswith(PREFIX)
    ]
    return [max(of_round) for of_round in zip(*rates, strict=True)]


def utilisation(
    name: str,
    flops: float,
    took: list[Took],
    found: Mapping[str, list[Took]],
    conditions: dict[str, Any],
) -> Iterator[Measurement]:
    """MFU: FLOPs per second of the model, of the best that products do in the same round.

    Args:
      name: begins that of the measurement.
      flops: by the formula, of one piece of work.
      took: of that work.
      found: from `timing.rounds`, with the ceiling.
      conditions: see Measurement.
    """
    for kind, called in timing.kinds().items():
        pairs = zip(took, best(found, kind), strict=True)
        shares = [flops * t.count / getattr(t, kind) / most for t, most in pairs]
        yield summarize(f"{name}: MFU", shares, f"of the ceiling ({called})", conditions)


def _turn(dtype: jnp.dtype, mesh: Mesh, side: int, repeats: int) -> Callable[[], Took]:
    rows = sharding.batch_sharding(mesh)
    shape = (mesh.size, side, side)

    # Not zeros: accelerators take less power for them, and go faster.
    @functools.partial(jax.jit, out_shardings=rows)
    def draw(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    a, b = draw(0), draw(1)
    product = jax.jit(jnp.matmul, in_shardings=rows, out_shardings=rows)

    def work() -> int:
        for _ in range(repeats):
            found = product(a, b)
        found.block_until_ready()
        return repeats * mesh.size * 2 * side**3

    return lambda: timing.timed(work)
