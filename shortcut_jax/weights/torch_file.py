"""Reads weight files as numpy arrays: PyTorch's .pth/.pt/.ckpt without PyTorch, and .safetensors.

A .pth file is a pickle, and a pickle may name any function to call. This reader knows the few
names that a state dict needs and refuses every other, so that a hostile file builds nothing but
arrays. Format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py, both the zip
archive of PyTorch 1.6 and later and the stream of pickles before it.
"""

import collections
import dataclasses
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from shortcut_jax.errors import UserError
from shortcut_jax.weights import restricted_pickle

_DTYPES: dict[str, Any] = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
MAX_COPIES = 4  # the arrays have at most so many times the bytes of the file
# First objects of a file of PyTorch before 1.6.
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name.

    Args:
      path: a file that `torch.save(module.state_dict(), path)` wrote, or .safetensors.

    Raises:
      UserError: the file is missing, is damaged, or holds anything but arrays by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected weights: mend the path.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except UserError:
        raise
    # What a damaged pickle raises depends on where it is damaged.
    except Exception as error:
        found = " ".join(f"{type(error).__name__} {error}".split()).rstrip(".")
        raise UserError(
            f"{path} cannot be read as weights ({found}); expected a state dict that PyTorch "
            "saved, or .safetensors: get the file again."
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        # PyTorch compresses nothing, so nothing that is read is larger than the file.
        stored = (info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        _require(all(stored), "the compression")
        order = folder + "byteorder"  # absent before PyTorch 2.1, which wrote little-endian
        _require(order not in archive.namelist() or archive.read(order) == b"little", "byte order")
        with archive.open(pickled) as content:
            tensors, _ = _load(content)
        return _arrays(tensors, _size(file), lambda s: archive.read(f"{folder}data/{s.key}"))


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    file.seek(0)
    header = [_load(file)[0] for _ in range(3)]
    _require(header[:2] == [_LEGACY_MAGIC, _LEGACY_VERSION], "its first bytes")
    _require(header[2]["little_endian"] is True, "byte order")
    tensors, storages = _load(file)
    content = {}
    for key in _load(file)[0]:
        storage = storages[key]
        (count,) = np.frombuffer(file.read(8), "<i8")
        _require(count == storage.count, "the length of a storage")
        content[key] = file.read(storage.count * storage.dtype.itemsize)
    return _arrays(tensors, _size(file), lambda storage: content[storage.key])


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, content: bytes) -> np.ndarray:
        numbers = (self.offset, *self.shape, *self.strides)
        _require(all(type(n) is int and n >= 0 for n in numbers), "the shape of a tensor")
        _require(len(self.shape) == len(self.strides), "the strides of a tensor")
        whole = np.frombuffer(content, self.storage.dtype)
        _require(whole.size == self.storage.count, "the length of a storage")
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        size = math.prod(self.shape)
        # Not more numbers than are stored: a small file cannot ask for all of the memory.
        _require(size <= whole.size, "the size of a tensor")
        _require(size == 0 or self.offset + last < whole.size, "the place of a tensor")
        strides = [s * whole.itemsize for s in self.strides]
        view = np.lib.stride_tricks.as_strided(
            whole[self.offset :], self.shape, strides, writeable=False
        )
        return view.copy()


class _Unpickler(pickle.Unpickler):
    """Builds plain values, OrderedDict and `_Tensor`; `storages` are those it met."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor  # a bound method: its attributes cannot be set
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        _require(kind == "storage" and type(key) is str and type(count) is int, "a storage")
        storage = _Storage(key, np.dtype(_DTYPES[dtype]), count)
        return self.storages.setdefault(key, storage)

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
    ) -> _Tensor:
        _require(isinstance(storage, _Storage), "the storage of a tensor")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _load(file: Any) -> tuple[Any, dict[str, _Storage]]:
    """One pickle, and the storages that it names."""
    restricted_pickle.refuse_memory(file)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


def _arrays(
    tensors: Any, file_size: int, content: Callable[[_Storage], bytes]
) -> dict[str, np.ndarray]:
    _require(isinstance(tensors, dict) and len(tensors) > 0, "its value, which is no mapping")
    for name, tensor in tensors.items():
        _require(type(name) is str and isinstance(tensor, _Tensor), f"the entry {name!r:.80}")
    # Tied weights share a storage, and each gets a copy: but not a million of them.
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    _require(total <= MAX_COPIES * file_size, "the size of all tensors")
    return {name: tensor.array(content(tensor.storage)) for name, tensor in tensors.items()}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is not that of a state dict")
