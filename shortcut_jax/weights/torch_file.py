"""Files that torch.save writes, read without PyTorch and without running what they name."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shortcut_jax import restricted_pickle
from shortcut_jax.errors import UserError
from shortcut_jax.restricted_pickle import Array, Call, Refused, Token

# Storages and what rebuilds tensors from them. A storage is named by a persistent id.
_STORAGES: Mapping[tuple[str, str], Any] = {
    ("torch", "FloatStorage"): np.float32,
    ("torch", "DoubleStorage"): np.float64,
    ("torch", "HalfStorage"): np.float16,
    ("torch", "BFloat16Storage"): ml_dtypes.bfloat16,
    ("torch", "LongStorage"): np.int64,
    ("torch", "IntStorage"): np.int32,
    ("torch", "BoolStorage"): np.bool_,
    ("torch", "ByteStorage"): np.uint8,
}


def read(path: Path, expected: str) -> Any:
    """What torch.load gives, with read-only numpy arrays for tensors.

    Args:
      path: a zip file: PREFIX/data.pkl, and the numbers of the storage KEY in PREFIX/data/KEY.
      expected: what it should be, for the sentence of an error.

    Raises:
      UserError: it is no such file, is damaged, or asks for more than tensors and containers.
      OSError: it cannot be opened.
    """
    try:
        return _read(path, expected)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected {expected}: give such a file, or save it "
            "again with a torch of 1.6 or later."
        ) from error


def _read(path: Path, expected: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(
                f"{path} is a zip file without a data.pkl; expected {expected}: give such a file."
            )
        folder = pickles[0].removesuffix("data.pkl")

        def storage(pid):
            kind, token, key, _, count = pid
            if kind != "storage" or type(token) is not Token or type(key) is not str:
                raise Refused("it refers to something that is no storage")
            dtype = np.dtype(_STORAGES["torch", token.name])
            info = archive.getinfo(f"{folder}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
                raise Refused(f"a storage of {count} numbers has {info.file_size} bytes")
            return _Storage(np.frombuffer(archive.read(info), dtype, count))

        names = {**{name: Token(name[1]) for name in _STORAGES}, **_REBUILD}
        with archive.open(pickles[0]) as file:
            return restricted_pickle.load(file, str(path), expected, names, storage)


class _Storage:
    __slots__ = ("values",)

    def __init__(self, values: np.ndarray):
        self.values = values


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Array:
    if type(storage) is not _Storage or len(shape) != len(strides):
        raise Refused("a tensor in it has no storage")
    numbers = (offset, *shape, *strides)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    outside = min(numbers) < 0 or (0 not in shape and last >= storage.values.size)
    if outside or any(type(n) is not int for n in numbers):
        raise Refused("a tensor in it reaches beyond its storage")
    values = storage.values
    return Array(
        np.lib.stride_tricks.as_strided(
            values[offset:], shape, [s * values.itemsize for s in strides], writeable=False
        )
    )


_REBUILD: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(lambda tensor, *_: tensor),
}
