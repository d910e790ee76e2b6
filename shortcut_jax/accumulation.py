"""The gradient of a mean over rows, in parts: less memory at once, the same sum.

The batch [B, ...] is split over devices by its first axis. A part has as many rows of every device,
so that cutting moves none: device s of n, with rows s B/n ... (s+1) B/n, gives the i-th of `parts`
equal stretches of them to part i.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# loss(params, rows, own=False) -> (mean over the rows, values [n] by row). own=True: the rows are
# those of one device, which works alone.
RowLoss = Callable[..., tuple[jax.Array, jax.Array]]


def value_and_grad(
    loss: RowLoss,
    params: Any,
    rows: Any,
    parts: int,
    by_rows: NamedSharding | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """`jax.value_and_grad(loss, has_aux=True)(params, rows)`, one part after the other.

    Where every device has all parameters, each goes through its own rows and gradients are summed
    over devices once, at the end. Where parameters are split, each part has them gathered and its
    gradients scattered.

    Args:
      loss: a mean over rows that do not depend on each other.
      params: float32.
      rows: tree of arrays [B, ...], B a multiple of `parts` times the devices.
      parts: 1 = all rows at once.
      by_rows: sharding of the rows; None on one device.

    Returns:
      ((loss, values [B] in the order of the rows), gradient). Equal but for the order of summation.
    """
    if parts == 1:
        return _gradient(loss, own=False)(params, rows)
    devices = by_rows.mesh.size if by_rows else 1
    if by_rows is None or devices == 1 or by_rows.mesh.shape["fsdp"] > 1:
        return _in_parts(_gradient(loss, own=False), params, rows, parts, devices)

    def of_own_rows(params: Any, rows: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        (mean, values), grads = _in_parts(_gradient(loss, own=True), params, rows, parts, 1)
        mean, grads = jax.lax.pmean((mean, grads), by_rows.mesh.axis_names)
        return (mean, values), grads

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_own_rows,
        mesh=by_rows.mesh,
        in_specs=(everywhere, by_rows.spec),
        out_specs=((everywhere, by_rows.spec), everywhere),
        check_vma=False,  # else gradients are summed over devices where they are made: every part's
    )(params, rows)


def _gradient(loss: RowLoss, own: bool) -> Callable[..., Any]:
    return jax.value_and_grad(functools.partial(loss, own=own), has_aux=True)


def _in_parts(
    gradient: Callable[..., Any], params: Any, rows: Any, parts: int, num_shards: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
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
