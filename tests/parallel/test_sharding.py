"""Which axis of which array is split over which axis of the mesh."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from shortcut_jax.parallel import sharding
from tests.golden import make_shardings


def mesh_of(data, fsdp):
    """A mesh of devices that need not exist."""
    return AbstractMesh((data, fsdp), sharding.AXES)


def spec(shape, fsdp, name="kernel"):
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
    return sharding.shard_tree(tree, mesh_of(1, fsdp))[name].spec


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((16, 64), 8, (None, "fsdp")),  # the largest axis
        ((64, 16), 8, ("fsdp", None)),
        ((16, 60), 8, ("fsdp", None)),  # the largest that can be split
        ((8, 8), 8, (None, "fsdp")),  # of equal ones, the last
        ((3, 24, 4), 8, (None, "fsdp", None)),
        ((8,), 8, ("fsdp",)),
        ((6, 10), 8, ()),  # none can be split
        ((), 8, ()),
        ((16, 64), 1, ()),  # data-parallel
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, fsdp, expected):
    assert spec(shape, fsdp) == PartitionSpec(*expected)


def test_what_cannot_be_split_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        spec((6, 10), 8, name="odd")
        spec((16, 64), 8, name="even")
    assert "odd (6, 10) is replicated: no axis is a multiple of fsdp=8" in caplog.text
    assert "even" not in caplog.text


def test_the_first_rule_that_matches_the_whole_path_wins(monkeypatch):
    rules = ((r"params/.*/bias", "replicate"), (r".*", "largest"))
    monkeypatch.setattr(sharding, "RULES", rules)
    array = jax.ShapeDtypeStruct((16,), jnp.float32)
    tree = {"params": {"dense": {"bias": array, "kernel": array, "bias_2": array}}}
    found = sharding.shard_tree(tree, mesh_of(1, 8))["params"]["dense"]
    assert found["bias"].spec == PartitionSpec()
    assert found["kernel"].spec == found["bias_2"].spec == PartitionSpec("fsdp")


def test_shard_tree_keeps_the_structure_and_the_mesh():
    mesh = mesh_of(2, 4)
    tree = {"a": [jnp.zeros((4, 2)), jnp.zeros(())], "b": (jnp.zeros(8),)}
    found = sharding.shard_tree(tree, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(found))


def test_batches_are_split_over_both_axes():
    mesh = mesh_of(2, 4)
    assert sharding.batch_sharding(mesh).shard_shape((16, 8, 8, 1)) == (2, 8, 8, 1)
    assert sharding.replicated(mesh).shard_shape((16, 8)) == (16, 8)


def test_to_global_and_back():
    batch = {"image": np.arange(12, dtype=np.float32).reshape(4, 3), "label": np.arange(4)}
    rows = sharding.batch_sharding(sharding.make_mesh(1, 1))
    found = sharding.to_global(batch, rows)
    assert found["image"].sharding == rows
    for key in batch:
        np.testing.assert_array_equal(sharding.to_host(found[key]), batch[key])


# ------------------------------------------------------------------ slices


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that need not exist."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def slices_of(num_slices, size, platform="tpu"):
    """Devices of slices, in an order that says nothing; a slice is a torus of 4 by `size` / 4."""
    devices = [
        Device(i, i // size, i // 4, (i % size % 4, i % size // 4, 0), platform)
        for i in range(num_slices * size)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize(("data", "fsdp"), [(2, 8), (4, 4), (16, 1)])
def test_slices_are_whole_rows_of_the_data_axis(data, fsdp):
    devices = slices_of(2, 8)
    assert sharding.num_slices(devices) == 2
    mesh = sharding.make_mesh(data, fsdp, devices)
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp}
    of_slice = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    # Half of the data axis each, one after the other: parameters never cross slices.
    np.testing.assert_array_equal(of_slice, np.repeat([[0], [1]], data // 2, axis=0) + 0 * of_slice)
    assert {device.id for device in mesh.devices.flat} == set(range(16))


def test_a_machine_without_slices_is_one():
    assert sharding.num_slices() == 1
    assert sharding.num_slices(slices_of(1, 8)) == 1


@pytest.mark.parametrize("fsdp", [1, 2, 8, 16])
def test_an_axis_may_have_a_part_of_the_wires(fsdp):
    mesh = sharding.make_mesh(16 // fsdp, fsdp, slices_of(1, 16))
    assert dict(mesh.shape) == {"data": 16 // fsdp, "fsdp": fsdp}
    assert {device.id for device in mesh.devices.flat} == set(range(16))


def test_hosts_of_gpus_are_no_slices():
    devices = slices_of(2, 8, platform="gpu")  # which have numbers of slices
    assert sharding.num_slices(devices) == 1
    ids = np.vectorize(lambda device: device.id)(sharding.make_mesh(1, 16, devices).devices)
    np.testing.assert_array_equal(ids, [np.arange(16)])


# ------------------------------------------------------------------ rows


def test_own_rows_of_the_only_process_are_all():
    np.testing.assert_array_equal(
        sharding.own_rows(6, sharding.make_mesh(1, 1)), np.arange(6)
    )  # of several: tests/programs/several.py


# ------------------------------------------------------------------ every parameter

GOLDEN = Path(__file__).parents[1] / "golden" / "shardings.txt"


def test_every_parameter_of_dit_b_and_xl_is_split_as_written_down():
    """A change of RULES, or of a parameter's name or shape, shows here."""
    assert make_shardings.table() == GOLDEN.read_text()


def test_a_layer_axis_is_never_split():
    assert spec((8, 16, 6), 8, name="params/blocks/qkv") == PartitionSpec(None, "fsdp", None)
    assert spec((8, 6), 8, name="opt_state/0/mu/blocks/bias") == PartitionSpec()
    assert spec((8, 6), 8, name="block_0/bias") == PartitionSpec("fsdp", None)
