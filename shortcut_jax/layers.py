"""The two layouts of the blocks' parameters: one entry for each block, or one for all.

Unrolled, a tree has block_0 ... block_{L-1}; scanned (`model.scan_layers`), it has `blocks`, whose
arrays have a leading axis [L, ...]. What leaves a training is unrolled: exported weights, digests.
Moving between the two changes no bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

PREFIX = "block_"  # of the blocks' names, unrolled
STACKED = "blocks"  # the name of all of them together, scanned


def stack(tree: Any, join: Callable[[Sequence[Any]], Any] = jnp.stack) -> Any:
    """The scanned layout of a tree, wherever in it there are blocks (params, optimizer state ...).

    Args:
      tree: of arrays, in either layout.
      join: makes one leaf [L, ...] of L leaves.

    Returns:
      The same tree with `blocks` in place of block_0, block_1 ...
    """

    def merge(node: Mapping[str, Any]) -> dict[str, Any]:
        depth = sum(name.startswith(PREFIX) for name in node)
        blocks = [node[f"{PREFIX}{i}"] for i in range(depth)]
        rest = {name: part for name, part in node.items() if not name.startswith(PREFIX)}
        return {**rest, STACKED: jax.tree.map(lambda *leaves: join(leaves), *blocks)}

    return _where(tree, f"{PREFIX}0", merge)


def unstack(tree: Any, split: Callable[[Any], Sequence[Any]] = tuple) -> Any:
    """The unrolled layout of a tree: the inverse of `stack`, with `split` that of `join`."""

    def cut(node: Mapping[str, Any]) -> dict[str, Any]:
        leaves, structure = jax.tree.flatten(node[STACKED])
        blocks = zip(*map(split, leaves), strict=True)
        rest = {name: part for name, part in node.items() if name != STACKED}
        return rest | {
            f"{PREFIX}{i}": jax.tree.unflatten(structure, b) for i, b in enumerate(blocks)
        }

    return _where(tree, STACKED, cut)


def of_blocks(name: str) -> bool:
    """Whether an entry of the parameters is a block, or all of them."""
    return name == STACKED or name.startswith(PREFIX)


def holds_stacked(tree: Any) -> bool:
    """Whether a tree of dicts, lists and tuples has blocks in the scanned layout."""
    found: list[Any] = []
    jax.tree.map(found.append, tree, is_leaf=lambda node: _has(node, STACKED))
    return any(_has(node, STACKED) for node in found)


def shapes_as(shapes: Any, stacked: bool) -> Any:
    """A tree of jax.ShapeDtypeStruct with shardings, in the scanned layout or the unrolled one."""
    return stack(shapes, _join_shapes) if stacked else unstack(shapes, _split_shapes)


def _join_shapes(blocks: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    one = blocks[0]
    spec = PartitionSpec(None, *one.sharding.spec)  # the axis of layers is never split
    shape, sharding = (len(blocks), *one.shape), NamedSharding(one.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding)


def _split_shapes(blocks: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    depth, *shape = blocks.shape
    sharding = NamedSharding(blocks.sharding.mesh, PartitionSpec(*blocks.sharding.spec[1:]))
    return [jax.ShapeDtypeStruct(shape, blocks.dtype, sharding=sharding)] * depth


def _has(node: Any, name: str) -> bool:
    return isinstance(node, Mapping) and name in node


def _where(tree: Any, name: str, change: Callable[[Mapping[str, Any]], Any]) -> Any:
    """`change` of every mapping in a tree that has an entry of that name."""
    return jax.tree.map(
        lambda node: change(node) if _has(node, name) else node,
        tree,
        is_leaf=lambda node: _has(node, name),
    )
