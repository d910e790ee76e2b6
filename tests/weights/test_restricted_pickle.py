"""What a pickle may build, and that one which asks for more is refused and runs nothing."""

import collections
import copyreg
import io
import os
import pickle
import struct
import sys

import flax.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shortcut_jax.errors import UserError
from shortcut_jax.weights import restricted_pickle
from tests.sentences import assert_sentence


def load(content):
    return restricted_pickle.load(io.BytesIO(content), "FILE", "a checkpoint")


def refused(content, *fragments):
    with pytest.raises(UserError) as caught:
        load(content)
    assert_sentence(str(caught.value), ["FILE", "expected a checkpoint", *fragments])
    return str(caught.value)


# ------------------------------------------------------------------ what is read

NUMBERS = st.sampled_from(
    [
        "?",
        "b",
        "i2",
        "i4",
        "i8",
        "u1",
        "u2",
        "u4",
        "u8",
        "f2",
        "f4",
        "f8",
        "c8",
        "c16",
        ">f4",
        ">i2",
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    array=st_numpy.arrays(NUMBERS.map(np.dtype), st_numpy.array_shapes(min_dims=0, min_side=0)),
    protocol=st.integers(0, 5),
    fortran=st.booleans(),
)
def test_arrays_come_back_bit_for_bit(array, protocol, fortran):
    array = np.asfortranarray(array) if fortran else array
    found = load(pickle.dumps(array, protocol))
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", range(6))
def test_what_checkpoints_hold(protocol):
    tree = {
        "numbers": [1, -2.5, True, None, 2**70],
        "text": ("a", b"b"),
        "ordered": collections.OrderedDict(x=np.arange(3)),
        "frozen": flax.core.FrozenDict({"y": {"z": np.float32(2.5)}}),
        "bfloat16": np.array([1, 2], ml_dtypes.bfloat16),
        "device": jnp.arange(4.0),
        "device, bfloat16": jnp.ones(2, jnp.bfloat16),
    }
    found = load(pickle.dumps(tree, protocol))
    assert found["numbers"] == tree["numbers"] and found["text"] == tree["text"]
    assert type(found["ordered"]) is type(found["frozen"]["y"]) is dict
    np.testing.assert_array_equal(found["ordered"]["x"], [0, 1, 2])
    assert found["frozen"]["y"]["z"] == np.float32(2.5)
    for name in ("bfloat16", "device", "device, bfloat16"):
        assert type(found[name]) is np.ndarray and found[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(found[name], np.asarray(tree[name]))


def test_an_optimizer_state_comes_as_plain_tuples():
    params = {"w": np.ones((2, 3), np.float32)}
    adam = optax.chain(optax.adamw(1e-3)).init(params)
    (adam_state, *_), *_ = load(pickle.dumps(adam))[0], None
    count, mu, nu = adam_state
    assert count == 0 and mu["w"].shape == nu["w"].shape == (2, 3)


OLD_NAMES = {
    "numpy before 2": (b"numpy._core.multiarray", b"numpy.core.multiarray"),
    "jax before 0.4": (
        b"jax._src.array\n_reconstruct_array", b"jax._src.device_array\nreconstruct_device_array",
    ),
    "jaxlib before ml_dtypes": (b"ml_dtypes\nbfloat16", b"jaxlib.xla_extension\nbfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("era", OLD_NAMES)
def test_names_of_other_versions(era):
    content = pickle.dumps(jnp.ones(2, jnp.bfloat16), protocol=2)  # whose names end with newlines
    now, then = OLD_NAMES[era]
    assert now in content
    np.testing.assert_array_equal(load(content.replace(now, then)), [1, 1])


# ------------------------------------------------------------------ hostile pickles


class Reduce:
    """Pickles as a call of `function`."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Mine:
    pass


def name(module, attribute):
    """STACK_GLOBAL of any name, dotted or not."""
    parts = (text.encode() for text in (module, attribute))
    return b"".join(b"\x8c" + bytes([len(p)]) + p for p in parts) + b"\x93"


def call(function, arguments):
    return function + arguments + b"R"


def proto(body):
    return b"\x80\x04" + body + b"."


DTYPE = call(name("numpy", "dtype"), b"\x8c\x02f4\x85")
EMPTY = call(
    name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87"
)
SETATTR = b"N}\x8c\x05fieldK\x01s\x86b"  # BUILD with (None, {"field": 1}): sets attributes

HOSTILE = {
    "system": (pickle.dumps(Reduce(os.system, ("touch RAN",))), ["posix.system"]),
    "eval": (pickle.dumps(Reduce(eval, ("open('RAN', 'w')",)), 0), ["builtin", "eval"]),
    "text protocol": (b"cos\nsystem\n(S'touch RAN'\ntR.", ["os.system"]),
    "inst": (b"(S'touch RAN'\nios\nsystem\n.", ["os.system"]),
    "obj": (b"\x80\x02(cos\nsystem\nX\x09\x00\x00\x00touch RANo.", ["os.system"]),
    "nested": (pickle.dumps({"a": [Reduce(list, (Reduce(exec, ("",)),))]}), ["builtins."]),
    "getattr": (pickle.dumps(Reduce(getattr, (1, "real"))), ["builtins.getattr"]),
    "a module of ours": (pickle.dumps(restricted_pickle.load), ["restricted_pickle.load"]),
    "dotted": (proto(name("numpy.core.multiarray", "_reconstruct.__globals__")), ["__globals__"]),
    "dotted in an allowed class": (proto(name("numpy", "dtype.__init__")), ["dtype.__init__"]),
    "optax, but no state": (proto(name("optax._src.base", "chain")), ["optax._src.base.chain"]),
    "optax, dotted": (proto(name("optax", "AState.__new__")), ["optax.AState.__new__"]),
    "numpy's loader": (proto(call(name("numpy", "load"), b"\x8c\x03RAN\x85")), ["numpy.load"]),
    "jax array by another function": (
        proto(call(name("jax._src.array", "_reconstruct_array"),
                   b"(" + name("collections", "OrderedDict") + b"))}t")), ["function of its own"],
    ),
    "subclass of ndarray": (
        proto(call(name("numpy.core.multiarray", "_reconstruct"),
                   name("collections", "OrderedDict") + b"K\x00\x85C\x01b\x87")),
        ["class of its own"],
    ),
    "attribute of a function": (proto(name("flax.core.frozen_dict", "FrozenDict") + SETATTR), []),
    "attribute of a class": (proto(name("numpy", "dtype") + SETATTR), []),
    "attribute of a token": (proto(name("numpy", "ndarray") + SETATTR), []),
    "a class by itself": (proto(name("numpy", "dtype")), ["no array"]),
    "state of a dtype": (proto(DTYPE + b"]b"), ["unknown state"]),
    "state of an array": (proto(EMPTY + b"}b"), ["unknown state"]),
    "object array": (pickle.dumps(np.array([Reduce(os.getcwd, ())], object)), []),
    "object array of nothing": (pickle.dumps(np.array([None, {}], object)), ["'O8'"]),
    "records": (pickle.dumps(np.zeros(2, [("a", "f4")])), ["no numbers"]),
    "text array": (pickle.dumps(np.array(["a"])), ["no numbers"]),
    "a class of somebody": (pickle.dumps(Mine()), ["Mine"]),
    "a set": (pickle.dumps({1, 2}), ["set"]),
    "keys": (pickle.dumps({(1, 2): 3}), ["keys of type tuple"]),
    "persistent id": (b"\x80\x04\x8c\x01aQ.", ["outside of the file"]),
    "extension code": (b"\x80\x04\x82\xf0.", []),
    "out of band": (b"\x80\x05\x97.", []),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where RAN would appear
    content, fragments = HOSTILE[case]
    modules = set(sys.modules)
    refused(content, *fragments)
    assert not list(tmp_path.iterdir())
    assert set(sys.modules) == modules


def test_a_refusal_leaves_nothing_behind():
    for content, _ in HOSTILE.values():
        with pytest.raises(UserError):
            load(content)
    np.testing.assert_array_equal(load(pickle.dumps(np.arange(3))), [0, 1, 2])
    assert not hasattr(restricted_pickle.DType, "field")


def test_extension_codes_that_were_registered_go_the_same_way(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("os", "system", 240)
    try:
        refused(b"\x80\x04\x82\xf0\x8c\x09touch RAN\x85R.", "os.system")
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported():
    assert "antigravity" not in sys.modules
    refused(proto(name("antigravity", "fly")), "antigravity.fly")
    assert "antigravity" not in sys.modules


# ------------------------------------------------------------------ sizes and damage


def array_of(shape, content):
    """A pickled array of float32 that says it has a shape and these bytes."""
    raw = b"B" + struct.pack("<I", len(content)) + content
    return proto(EMPTY + b"(K\x01" + pickle.dumps(shape, 2)[2:-1] + DTYPE + b"\x89" + raw + b"tb")


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((3,), b"1234" * 2),
        ((2**40, 2**40), b"1234"),
        ((-1,), b"1234"),
        ((1,), b""),
        ((1.0,), b"1234"),
    ],
)
def test_an_array_has_as_many_bytes_as_its_shape_says(shape, content):
    np.testing.assert_array_equal(load(array_of((2,), b"\0" * 8)), [0, 0])
    refused(array_of(shape, content), "bytes, which are not")


def test_trees_that_explode_or_never_end():
    node = []
    for _ in range(40):  # 2**40 leaves in 1 kB
        node = [node, node]
    refused(pickle.dumps(node), "more than")
    endless = []
    endless.append(endless)
    refused(pickle.dumps(endless), "more than")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_pickles_are_a_sentence(data):
    tree = {"a": np.arange(5.0), "b": [1, "x", (np.float32(3), jnp.ones(2))]}
    content = pickle.dumps(tree, data.draw(st.integers(0, 5)))
    cut = data.draw(st.integers(0, len(content) - 1))
    refused(content[:cut])
    flipped = bytearray(content)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    try:
        load(bytes(flipped))  # may well be a pickle of something else, of what is allowed
    except UserError as error:
        assert_sentence(str(error), ["FILE"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"not a pickle", b"\0" * 99])
def test_other_files(content):
    refused(content, "cannot be read")
