"""Reads pickles of arrays and plain containers, and runs nothing that they ask for.

A pickle is a program: it names functions and says what to call them with. Here every name is looked
up in a table of this module and nowhere else; behind each stands an inert stand-in that checks its
arguments, and no module is imported because a pickle names it. What comes out is checked once more:
dicts, lists, tuples, numbers, text, bytes and numpy arrays. A name that is not in the table refuses
the file.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from shortcut_jax.errors import UserError

MAX_DEPTH = 64  # of containers in containers
MAX_NODES = 100_000  # DiT-XL with its optimizer state has 3,500


class Refused(Exception):
    """The pickle asks for something it may not have; the text says what."""


class Unpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, scalars and stand-ins of arrays; `plain` makes those arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TABLE:
            return TABLE[module, name]
        # Optimizer states are named tuples, a dozen classes whose modules have moved.
        if re.fullmatch(r"optax(\.\w+)*", module) and re.fullmatch(r"\w*State", name):
            return _Fields
        shown = ascii(f"{module}.{name}"[:100])[1:-1]  # may hold anything, such as new lines
        raise Refused(f"it names {shown}")

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to objects outside of the file")


def load(file: IO[bytes], source: str, expected: str) -> Any:
    """Reads one pickle. It takes as much memory as the file is large.

    Args:
      file: opened for binary reading.
      source: name of the file, for the sentence of an error.
      expected: what it should be, for the sentence of an error.

    Returns:
      Dicts, lists, tuples, numbers, text, bytes and numpy arrays (read-only).

    Raises:
      UserError: it is no pickle, is damaged, or asks for anything else.
    """
    try:
        refuse_memory(file)
        return plain(Unpickler(file).load())
    except Refused as error:
        raise UserError(
            f"{source} is refused: {error}, and only arrays and plain containers are read, because "
            f"loading a pickle may run what it names; expected {expected}: give such a file, from "
            "a source that you trust."
        ) from error
    # What a damaged pickle raises is not documented ("any exception").
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise UserError(
            f"{source} cannot be read ({found}); expected {expected}: fetch it again, or give "
            "another file."
        ) from error


def refuse_memory(file: IO[bytes]) -> None:
    """Refuses one pickle that makes Python's reader take memory by a number in it alone.

    The reader makes room for the largest number under which a pickle notes a value, or for as many
    bytes as an array of bytes is said to have. The file is then where it was.

    Raises:
      Refused: it notes a value under a number that is larger than what it has noted before.
      ValueError: it is no whole pickle.
    """
    start, noted = file.tell(), 0
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            noted += 1
            if argument is not None and argument > noted + 256:
                raise Refused(f"it notes a value under number {argument}")
    file.seek(start)


def plain(found: Any) -> Any:
    """The tree with arrays for their stand-ins.

    Raises:
      Refused: it holds anything that is not on the list of this module, or is too large a tree.
    """
    count = 0

    def convert(node, depth):
        nonlocal count
        count += 1  # of visits: one container may be in many, and itself be a way to hang a reader
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise Refused(f"it has more than {MAX_NODES} entries, or {MAX_DEPTH} levels of them")
        kind = type(node)
        if node is None or kind in (bool, int, float, str, bytes):
            return node
        if kind is Array:
            return node.value()
        if kind is _Fields:
            return convert(node.fields, depth + 1)
        if kind in (dict, Dict):
            for key in node:
                if type(key) not in (str, int):
                    raise Refused(f"a dict in it has keys of type {type(key).__name__}")
            return {key: convert(value, depth + 1) for key, value in node.items()}
        if kind in (list, tuple):
            return kind(convert(value, depth + 1) for value in node)
        raise Refused(f"it builds an object that is no array or container ({kind.__name__})")

    return convert(found, 0)


# ---------------------------------------------------------------------- stand-ins
#
# None of them has a __dict__ or a settable attribute, and their classes refuse changes, because a
# pickle may also set attributes of whatever it can reach.


class _Sealed(type):
    def __setattr__(cls, name, value):
        raise Refused(f"it changes {cls.__name__}.{name}")

    def __delattr__(cls, name):
        raise Refused(f"it changes {cls.__name__}.{name}")


class Call(metaclass=_Sealed):
    """Stands in for a function: calls one of this package with what the pickle gives."""

    __slots__ = ("_function",)

    def __new__(cls, function: Callable[..., Any]):
        self = super().__new__(cls)
        object.__setattr__(self, "_function", function)
        return self

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise Refused("it changes a function")


class Token(metaclass=_Sealed):
    """Stands in for a class that is only passed on, as numpy.ndarray is to what rebuilds arrays."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, name: str):
        self = super().__new__(cls)
        object.__setattr__(self, "name", name)
        return self

    def __setattr__(self, name, value):
        raise Refused("it changes a class")


class Dict(dict, metaclass=_Sealed):
    """An OrderedDict or FrozenDict; attributes that a pickle gives to it are dropped."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Fields(metaclass=_Sealed):
    """A named tuple: its fields, in order."""

    __slots__ = ("fields",)

    def __new__(cls, *fields):
        self = super().__new__(cls)
        self.fields = fields
        return self

    def __setstate__(self, state):
        raise Refused("a named tuple in it has a state")


class DType(metaclass=_Sealed):
    """A type of numbers. Byte order comes as a state, after the type itself."""

    __slots__ = ("dtype",)

    def __new__(cls, name, *_):
        self = super().__new__(cls)
        if type(name) is Token and name.name in _NAMED_DTYPES:
            self.dtype = _NAMED_DTYPES[name.name]
        elif type(name) is str and re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            self.dtype = np.dtype(name)
        else:
            shown = name.name if type(name) is Token else name
            raise Refused(f"it holds an array of {shown!r:.40}, which are no numbers")
        return self

    def __setstate__(self, state):
        # (version, byte order, subarray, names, fields, itemsize, alignment, flags ...)
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise Refused("a type of numbers in it has an unknown state")
        if any(part is not None for part in state[2:5]):
            raise Refused("it holds an array of records")
        if self.dtype.kind in "biufc" and state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class Array(metaclass=_Sealed):
    """An array to be: first empty, then given its state (version, shape, type, order, bytes)."""

    __slots__ = ("_value",)

    def __new__(cls, value=None):
        self = super().__new__(cls)
        self._value = value
        return self

    def __setstate__(self, state):
        if type(state) is not tuple or len(state) != 5:
            raise Refused("an array in it has an unknown state")
        _, shape, dtype, fortran, content = state
        self._value = from_bytes(content, dtype, shape, "F" if fortran else "C")

    def value(self) -> np.ndarray:
        if self._value is None:
            raise Refused("an array in it has no content")
        return self._value


def from_bytes(content: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    """The array of that content, without a copy.

    Raises:
      Refused: type, shape and number of bytes do not go together.
    """
    if type(dtype) is not DType or type(content) not in (bytes, bytearray):
        raise Refused("it holds an array of objects, or of something unknown")
    whole = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
    if not whole or math.prod(shape) * dtype.dtype.itemsize != len(content) or len(shape) > 32:
        raise Refused(
            f"an array in it has {len(content)} bytes, which are not {shape!r:.80} of {dtype.dtype}"
        )
    if order not in ("C", "F"):
        raise Refused(f"an array in it has an unknown order {order!r:.20}")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _empty_array(kind: Any, shape: Any, code: Any) -> Array:
    if type(kind) is not Token or kind.name != "ndarray":
        raise Refused("it rebuilds an array of a class of its own")
    return Array()


def _array_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array(from_bytes(content, dtype, shape, order))


def _scalar(dtype: Any, content: Any) -> Array:
    return Array(from_bytes(content, dtype, ()))


def _jax_array(function: Any, args: Any, state: Any, *_: Any) -> Array:
    if function is not _EMPTY_ARRAY or type(args) is not tuple:
        raise Refused("it rebuilds an array with a function of its own")
    array = _empty_array(*args)
    array.__setstate__(state)
    return array


def _mapping(*args: Any) -> Dict:
    return Dict(*args)


def _latin1(text: Any, encoding: Any) -> bytes:
    # Protocols 0 to 2 have no bytes and write them like this.
    if type(text) is not str or encoding != "latin1":
        raise Refused("it encodes something that is no bytes")
    return text.encode("latin1")


_NAMED_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_EMPTY_ARRAY = Call(_empty_array)
_BFLOAT16 = Token("bfloat16")
_DICT = Call(_mapping)

TABLE: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Token("ndarray"),
    ("numpy", "dtype"): DType,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _EMPTY_ARRAY),
            ("multiarray", "scalar", Call(_scalar)),
            ("numeric", "_frombuffer", Call(_array_from_buffer)),
        )
    },
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    ("jaxlib.xla_extension", "bfloat16"): _BFLOAT16,  # before ml_dtypes was a package
    ("jax._src.array", "_reconstruct_array"): Call(_jax_array),
    ("jax._src.device_array", "reconstruct_device_array"): Call(_jax_array),
    ("collections", "OrderedDict"): _DICT,
    ("flax.core.frozen_dict", "FrozenDict"): _DICT,
    ("_codecs", "encode"): Call(_latin1),
    ("__builtin__", "bytes"): Call(lambda: b""),  # as protocols 0 to 2 write no bytes at all
}
