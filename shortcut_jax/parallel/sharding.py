"""Which device holds what: a named mesh, and a table from parameter name to rule.

The mesh has two axes. The batch is split over both; parameters, EMA and optimizer state are split
over "fsdp" alone. Data-parallel training is fsdp = 1, fully sharded training is data = 1, and
anything between is both: mesh shapes, not code. On several slices each has whole "fsdp" groups.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")

# Pattern of the whole path of an array, and which of its axes is split over "fsdp": the largest one
# that it divides, by "largest" of all axes, by "largest_in_layer" of all but the first, by
# "replicate" of none. The first match wins. A train state's paths end in those of its parameters
# (opt_state/0/mu/block_0/qkv/kernel), so that what belongs to a parameter is split like it.
RULES = (
    (r"metrics/.*", "replicate"),  # sums over the batch
    (r"(.*/)?blocks/.*", "largest_in_layer"),  # [L, ...] under model.scan_layers: each layer alike
    (r".*", "largest"),
)


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes; `validation.mesh_shape` gives the sizes.

    Neighbours on an axis are neighbours on the wires, of which an axis may take a part. Across
    slices of TPUs, which a slower network joins, goes "data" alone: slice by slice, with every
    group of `fsdp` devices within one.

    Args:
      data: size of the axis; a multiple of the number of slices.
      fsdp: size of the axis.
      devices: other ones than those of this run; the first that it takes are used.
    """
    devices = list(devices or jax.devices())[: data * fsdp]
    slices = num_slices(devices)
    if slices == 1:
        found = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    else:
        found = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * 2)


def num_slices(devices: Sequence[jax.Device] | None = None) -> int:
    """How many slices of TPUs the devices are of (all devices by default); 1 for all else."""
    devices = devices or jax.devices()
    # Hosts of GPUs have numbers of slices, too.
    return len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"}) or 1


def local_mesh() -> Mesh:
    """A mesh over the devices of this process, for work that processes do by themselves."""
    devices = jax.local_devices()
    return make_mesh(len(devices), 1, devices)


def platform(mesh: Mesh) -> str:
    """The kind of device that a mesh is of: "cpu", "tpu", "gpu"."""
    return mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch: split over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_tree(shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of parameters or of a train state.

    Args:
      shapes: tree of things with a `shape`; the path of a leaf is what `RULES` match.
      mesh: from `make_mesh`.

    Returns:
      A tree of the same structure. What no axis of can be split is replicated, with a log line.
    """

    def leaf(path, a):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _spec(name, a.shape, mesh.shape["fsdp"])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
    if rule == "replicate" or fsdp == 1 or not shape:
        return PartitionSpec()
    first = 1 if rule == "largest_in_layer" else 0
    for axis in np.argsort(shape[first:], kind="stable")[::-1] + first:
        if shape[axis] % fsdp == 0:
            return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))
    logging.info("%s %s is replicated: no axis is a multiple of fsdp=%d", name, shape, fsdp)
    return PartitionSpec()


def own_rows(count: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of `count` are on devices of this process, ascending.

    They need not be neighbours: on TPUs a mesh follows the wires between chips, not the hosts.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return np.sort(np.concatenate([np.arange(count)[place] for place in places]))


def to_global(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, each process giving its `own_rows`, to arrays of the whole batch on the mesh."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, the same on every process, whole on every device; nothing is exchanged.

    (jax.device_put compares the processes' arrays, for which all of them must get there.)
    """
    everywhere = replicated(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(np.shape(a), everywhere, lambda _: np.asarray(a)),
        tree,
    )


def to_host(a: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if a.is_fully_addressable:
        return np.asarray(a)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(a, tiled=True))


def local_rows(a: jax.Array) -> np.ndarray:
    """The rows of a batch that this process holds, in order."""
    if a.is_fully_addressable:
        return np.asarray(a)
    shards = {shard.index[0].start: shard.data for shard in a.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])


def begin_gather(rows: np.ndarray, mesh: Mesh) -> Callable[[], np.ndarray]:
    """Sends the rows of a batch to all processes, without waiting for it.

    Args:
      rows: what `local_rows` gives this process.
      mesh: of all processes; they call this in one order, with programs that exchange anything.

    Returns:
      What waits, and gives the whole batch.
    """
    if jax.process_count() == 1:
        return lambda: rows
    whole = jax.device_put(to_global(rows, batch_sharding(mesh)), replicated(mesh))
    if platform(mesh) == "cpu":  # in gloo nothing keeps exchanges apart that go on at once
        whole.block_until_ready()
    return lambda: np.asarray(whole)
