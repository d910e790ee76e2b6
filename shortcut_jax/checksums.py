"""Checksums of arrays that may be spread over devices and processes.

Neither orbax nor tensorstore notices every flipped bit in what it reads back. The sums here are of
the values, not of files: they cost one pass over the arrays where they lie, and are the same
whatever the mesh, the number of processes and the part that is read.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of the axes: an element's place is the sum of its indices times these.
_WEIGHTS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x2545F491, 0x632BE5AB)


def of_arrays(tree: Any) -> dict[str, int]:
    """Path of every leaf -> its checksum, 32 bits; the same on all processes.

    Args:
      tree: of arrays with up to 7 axes, whose items have 1, 2 or 4 bytes.
    """
    return named(tree, dispatch(tree))


def dispatch(tree: Any) -> jax.Array:
    """The checksums of the leaves, uint32 [leaves], when the devices get to them; see `named`."""
    return _checksums(jax.tree.leaves(tree))


def named(tree: Any, sums: jax.Array) -> dict[str, int]:
    """What `of_arrays` gives, of what `dispatch` gave for a tree; waits for the devices."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return {name: int(found) for name, found in zip(names, np.asarray(sums), strict=True)}


def of_json(value: Mapping[str, Any]) -> str:
    """16 hex digits of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit  # One program for all: the collectives of many at once can wait for each other on a CPU.
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(a: jax.Array) -> jax.Array:
    """Sum of the bits of every element, mixed with its place, mod 2^32.

    Integers add up to the same in any order, so in any sharding. Every step of the mixing (it is
    MurmurHash3's last one) has an inverse: whatever changes one element changes the sum.
    """
    if a.dtype == jnp.bool_:
        a = a.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)
    place = jnp.zeros(a.shape, jnp.uint32)
    for axis, weight in zip(range(a.ndim), _WEIGHTS, strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * np.uint32(weight)
    mixed = bits ^ place
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
