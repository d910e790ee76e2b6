"""The least that a training step can send between devices: what docs/scaling.md compares with.

Data-parallel, every device has the parameters and the gradients are summed once. Fully sharded,
a device has a part of each parameter: it gathers the others for each pass through the network and
drops them after it, and gets its part of the sum of the gradients. For N bytes of parameters on
f = fsdp devices in each of d = data groups, with g passes, ring algorithms send each device

    dp (f = 1)   2 N (d-1)/d
    fsdp         g N (f-1)/f + N (f-1)/f + 2 N/f (d-1)/d

(Patarasuk and Yuan 2009 for the sums; ZeRO-3 of Rajbhandari et al. 2020 for fsdp, where g = 2). It
is the least for steps that bring parameters to the rows. A compiler may send less: by bringing few
rows to large parameters, or by keeping what it has gathered, which takes the memory that fsdp
saves.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import NamedSharding

# Passes that need the parameters in a step of the shortcut model: two half-steps of the targets,
# forward, backward (Algorithm 1).
SHORTCUT_PASSES = 4


def least(shapes: Any, shardings: Any, passes: int, itemsize: int) -> dict[str, float]:
    """Bytes that a device must be sent in a step.

    Args:
      shapes: tree of parameters, or of what has their shapes.
      shardings: tree of NamedShardings of them on a mesh of `sharding.make_mesh`.
      passes: that need every parameter, forward and backward.
      itemsize: bytes of a number as it is sent: of the type that the network computes in.

    Returns:
      path of a parameter -> bytes.
    """
    found = {}
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    for (path, leaf), placed in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * itemsize
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = _least_of_one(size, placed, passes)
    return found


def _least_of_one(size: int, placed: NamedSharding, passes: int) -> float:
    data, fsdp = placed.mesh.shape["data"], placed.mesh.shape["fsdp"]
    if "fsdp" not in placed.spec:
        return 2 * size * (1 - 1 / (data * fsdp))
    others = size * (1 - 1 / fsdp)
    return passes * others + others + 2 * size / fsdp * (1 - 1 / data)


def layer(path: str) -> str:
    """The layer of a parameter's path, blocks alike: "block_3/qkv/kernel" -> "blocks/qkv"."""
    first, _, rest = re.sub(r"^block_\d+/", "blocks/", path).partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first == "blocks" else first


def origin(source: str) -> tuple[str, str]:
    """Where in the step an operation is from, by the compiler's metadata.

    Args:
      source: `collectives.Collective.source`, such as
        "jit(train_step)/transpose(jvp(DiT))/block_3/qkv/dot_general".

    Returns:
      The pass ("targets", "forward", "backward" or "") and the layer (as `layer` names it), or ""
      where the operation is of several or nothing is said.
    """
    if re.match(r"jit\(\w+\)/\(.*:", source):  # the compiler has joined several
        return ("backward" if "transpose(" in source else ""), ""
    match = re.search(r"(transpose\(jvp\(DiT\)\)|jvp\(DiT\)|DiT)/(.*)", source)
    if not match:
        return "", ""
    name = {"DiT": "targets", "jvp(DiT)": "forward"}.get(match[1], "backward")
    inside = re.sub(r"while/body/|closed_call/|checkpoint/|rematted_computation/", "", match[2])
    inside = inside.replace("blocks.<lambda>/", "")
    return name, layer(inside)
