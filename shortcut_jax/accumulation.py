"""The gradient of a mean over rows, in parts: less memory at once, the same sum.

The batch [B, ...] is split over devices by its first axis. A part has as many rows of every device,
so that cutting moves none: device s of n, with rows s B/n ... (s+1) B/n, gives the i-th of `parts`
equal stretches of them to part i.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# loss(params, rows) -> (mean over the rows, values [n] by row)
RowLoss = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def value_and_grad(
    loss: RowLoss, params: Any, rows: Any, parts: int, num_shards: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """`jax.value_and_grad(loss, has_aux=True)(params, rows)`, one part after the other.

    Args:
      loss: a mean over rows that do not depend on each other.
      params: float32.
      rows: tree of arrays [B, ...], B a multiple of parts * num_shards.
      parts: 1 = all rows at once.
      num_shards: parts that the rows are sharded into.

    Returns:
      ((loss, values [B] in the order of the rows), gradient). Equal but for the order of summation.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, rows)

    def one_part(total, part):
        found, grads = gradient(params, part)
        return jax.tree.map(jnp.add, total, grads), found

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (losses, values) = jax.lax.scan(one_part, zeros, split(rows, parts, num_shards))
    grads = jax.tree.map(lambda a: a / parts, total)
    return (losses.mean(), join(values, num_shards)), grads


def split(tree: Any, parts: int, num_shards: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]."""

    def cut(a):
        stretches = a.reshape(num_shards, parts, -1, *a.shape[1:]).swapaxes(0, 1)
        return stretches.reshape(parts, -1, *a.shape[1:])

    return jax.tree.map(cut, tree)


def join(a: jax.Array, num_shards: int) -> jax.Array:
    """[parts, B / parts] as [B]: the inverse of `split`."""
    return a.reshape(a.shape[0], num_shards, -1).swapaxes(0, 1).reshape(-1)
