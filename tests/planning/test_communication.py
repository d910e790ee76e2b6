"""The least that a step can send, and where in the network an operation is from."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from shortcut_jax.planning import communication

SPLIT, WHOLE = PartitionSpec(None, "fsdp"), PartitionSpec()


def sent(data, fsdp, spec, shape=(8, 16), passes=4, itemsize=2):
    mesh = AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"layer": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    shardings = {"layer": {"kernel": NamedSharding(mesh, spec)}}
    found = communication.least(shapes, shardings, passes, itemsize)
    assert found.keys() == {"layer/kernel"}
    return found["layer/kernel"]


N = 8 * 16 * 2


def test_one_device_is_sent_nothing():
    assert sent(1, 1, WHOLE) == 0


@pytest.mark.parametrize("devices", [2, 8])
def test_data_parallel_is_sent_gradients_twice_over(devices):
    # Its part of the sum from the others, then their parts.
    assert sent(devices, 1, WHOLE) == pytest.approx(2 * N * (devices - 1) / devices)


def test_fully_sharded_gathers_for_every_pass_and_scatters_once():
    assert sent(1, 8, SPLIT) == pytest.approx((4 + 1) * N * 7 / 8)
    assert sent(1, 8, SPLIT, passes=2) == pytest.approx(3 * N * 7 / 8)  # ZeRO-3


def test_both_at_once_sum_parts_between_groups():
    within = (4 + 1) * N * 3 / 4
    assert sent(2, 4, SPLIT) == pytest.approx(within + 2 * (N / 4) * 1 / 2)


def test_what_cannot_be_split_is_summed_over_all_devices():
    assert sent(2, 4, WHOLE) == pytest.approx(2 * N * 7 / 8)


def test_a_parameter_counts_in_the_type_that_is_sent():
    assert sent(1, 8, SPLIT, itemsize=4) == 2 * sent(1, 8, SPLIT)
    assert sent(1, 8, SPLIT, shape=(3, 8, 16)) == 3 * sent(1, 8, SPLIT)
    assert math.isclose(sent(1, 8, SPLIT, passes=0), N * 7 / 8)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("block_11/qkv/kernel", "blocks/qkv"),
        ("blocks/mlp_in/bias", "blocks/mlp_in"),
        ("t_embed/in/kernel", "t_embed"),
        ("output/kernel", "output"),
    ],
)
def test_layers_of_parameters(path, layer):
    assert communication.layer(path) == layer


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ("jit(train_step)/DiT/block_3/qkv/dot_general", ("targets", "blocks/qkv")),
        ("jit(train_step)/jvp(DiT)/label_embed/jit(_take)/gather", ("forward", "label_embed")),
        (
            "jit(train_step)/transpose(jvp(DiT))/while/body/closed_call/blocks.<lambda>/blocks/"
            "modulation/dot_general",
            ("backward", "blocks/modulation"),
        ),
        (
            "jit(train_step)/(transpose(jvp(DiT))/block_0/qkv/reduce_sum:transpose(jvp(DiT))/x)",
            ("backward", ""),
        ),
        ("jit(train_step)/reduce_sum", ("", "")),
        ("", ("", "")),
    ],
)
def test_where_an_operation_is_from(source, origin):
    assert communication.origin(source) == origin
