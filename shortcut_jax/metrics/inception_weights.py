"""The weights of the FID's Inception-v3: the published file, and random ones for tests.

Needs neither JAX nor PyTorch, so that both sides of a comparison can make the same random weights.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shortcut_jax import torch_file
from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of
from shortcut_jax.published import PUBLISHED

NAME = "inception-2015-12-05"
SHA256 = PUBLISHED[NAME].sha256

# Named in place of a file: weights that measure nothing, made on the spot.
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays of the network by their PyTorch names, and what they are.

    Attributes:
        name: "" for the published weights alone; what to call others.
        sha256: of the file, or of the numbers themselves if there is none.
        arrays: name -> float32 array, convolutions as [out, in, rows, columns].
    """

    name: str
    sha256: str
    arrays: Mapping[str, np.ndarray]


def check(inception_weights: str = "", inception_sha256: str = "", **_: str) -> None:
    """Refuses weights that `load` would refuse for what they are named.

    Args:
        inception_weights: path of the published file, of another one with the same names (.pth or
            .safetensors), or "random".
        inception_sha256: that the file must have; "" for that of the published file.

    Raises:
        UserError: no file, or another hash.
    """
    if inception_weights == RANDOM:
        return
    if not inception_weights or not Path(inception_weights).is_file():
        raise UserError(
            f"eval.inception_weights={inception_weights!r} is not a file; expected the network of "
            f"the FID: python -m shortcut_jax.download {NAME} --out=FILE fetches it; set that key, "
            "in the config file, to its path."
        )
    found, expected = sha256_of(Path(inception_weights)), inception_sha256 or SHA256
    if found != expected:
        raise UserError(
            f"eval.inception_weights={inception_weights} has sha256 {found}, expected {expected}: "
            "get the file again, or set eval.inception_sha256 if other weights are meant, whose "
            "distances are then not called FID."
        )


def load(
    shapes: Mapping[str, tuple[int, ...]], inception_weights: str = "", inception_sha256: str = ""
) -> Weights:
    """Weights that `check` accepts.

    Args:
        shapes: what the network needs: name -> shape.
        inception_weights, inception_sha256: see `check`.

    Raises:
        UserError: what `check` refuses, or not the weights of this network.
    """
    check(inception_weights, inception_sha256)
    if inception_weights == RANDOM:
        arrays = {name: random_array(name, shape) for name, shape in shapes.items()}
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
        return Weights(RANDOM, digest.hexdigest(), arrays)
    arrays = torch_file.read(inception_weights)
    for name, shape in shapes.items():
        there = arrays[name].shape if name in arrays else None
        if there != shape:
            raise UserError(
                f"eval.inception_weights={inception_weights} holds {name} of shape {there}, "
                f"expected {shape}: use weights of the FID's network, pt_inception-2015-12-05."
            )
    sha256 = sha256_of(Path(inception_weights))
    label = "" if sha256 == SHA256 else sha256[:8]
    return Weights(label, sha256, {name: arrays[name].astype(np.float32) for name in shapes})


def random_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Seeded float32 numbers for one array; the same in every version of numpy.

    Uniform. Kernels have the scale that keeps the size of activations through ReLUs; the running
    statistics are far from 0 and 1, so that a network which ignores them differs.
    """
    # Raw bits of a bit generator are fixed by numpy's compatibility policy; draws of its
    # distributions are not.
    bits = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    uniform = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    fan_in = math.prod(shape[1:])
    if fan_in > 1:
        low, high = -math.sqrt(6 / fan_in), math.sqrt(6 / fan_in)
    elif name.endswith(("running_var", "bn.weight")):
        low, high = 0.5, 1.5
    else:
        low, high = -0.5, 0.5
    return (np.float32(low) + np.float32(high - low) * uniform).reshape(shape)
