"""Numbers that are the same under every version of numpy: the raw bits of Philox 4x64."""

import math
import zlib

import numpy as np


def values(name: str, shape: tuple[int, ...], scale: float, bits: int = 24) -> np.ndarray:
    """float32 in [-scale, scale), uniform, a function of the name; few `bits` compress well."""
    stream = np.random.Philox(key=zlib.crc32(name.encode()))
    raw = stream.random_raw(math.prod(shape)).reshape(shape) >> np.uint64(64 - bits)
    return ((raw / 2.0 ** (bits - 1) - 1) * scale).astype(np.float32)


def parameter(name: str, shape: tuple[int, ...], bits: int = 24) -> np.ndarray:
    """A parameter of a network: kernels that keep the scale of their input, small biases."""
    if len(shape) == 1:
        return values(name, shape, 0.125, bits)
    scale = 0.5 if name.endswith("embedding") else math.sqrt(3 / math.prod(shape[:-1]))
    return values(name, shape, scale, bits)
