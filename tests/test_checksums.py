"""Every change of an array changes its checksum; where it lies does not."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax import checksums

ARRAYS = {
    "float32": np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4),
    "bfloat16": np.linspace(-3, 3, 24).astype(jnp.bfloat16).reshape(6, 4),
    "int32": np.arange(24, dtype=np.int32).reshape(24),
    "uint8": np.arange(24, dtype=np.uint8).reshape(4, 6),
    "scalar": np.float32(2).reshape(()),
}


def checksum(a):
    return checksums.of_arrays({"a": jnp.asarray(a)})["a"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_changes_it(data):
    a = ARRAYS[data.draw(st.sampled_from(sorted(ARRAYS)))]
    raw = bytearray(a.tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = np.frombuffer(bytes(raw), a.dtype).reshape(a.shape)
    assert checksum(changed) != checksum(a)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(set(ARRAYS) - {"scalar"})), st.data())
def test_two_elements_that_change_places_change_it(name, data):
    a = ARRAYS[name]
    i, j = data.draw(st.lists(st.integers(0, 23), min_size=2, max_size=2, unique=True))
    moved = a.reshape(-1).copy()
    moved[[i, j]] = moved[[j, i]]
    assert checksum(moved.reshape(a.shape)) != checksum(a)


def test_names_are_paths():
    tree = {"params": {"kernel": jnp.ones(3)}, "mask": jnp.array([True, False])}
    assert checksums.of_arrays(tree).keys() == {"params/kernel", "mask"}


def test_json_in_another_order_is_the_same():
    assert checksums.of_json({"a": 1, "b": 2}) == checksums.of_json({"b": 2, "a": 1})
    assert checksums.of_json({"a": 1}) != checksums.of_json({"a": 2})
