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

# The file that pytorch-fid and torch-fidelity both load, made from TensorFlow's graph of
# 2015-12-05. Both release pages serve the same bytes.
URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BYTES = 95_628_359

# Named in place of a file: weights that measure nothing, made on the spot.
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays of the network by their PyTorch names, and what they are.

    Attributes:
        name: "fid" for the published weights alone; of other ones, "fd_inception_...".
        sha256: of the file, or of the numbers themselves if there is none.
        arrays: name -> float32 array, convolutions as [out, in, rows, columns].
    """

    name: str
    sha256: str
    arrays: Mapping[str, np.ndarray]


def load(source: str, sha256: str, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights of a file, checked.

    Args:
        source: path of the published file, of another one with the same names (.pth or
            .safetensors), or "random".
        sha256: that the file must have; "" for that of the published file.
        shapes: what the network needs: name -> shape.

    Raises:
        UserError: no file, another hash, not a file of weights, or not the weights of this network.
    """
    if source == RANDOM:
        arrays = {name: random_array(name, shape) for name, shape in shapes.items()}
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
        return Weights("fd_inception_random", digest.hexdigest(), arrays)
    path, expected = Path(source), sha256 or SHA256
    if not source or not path.is_file():
        raise UserError(
            f"eval.inception_weights={source!r} is not a file; expected the Inception-v3 of the "
            f"FID ({BYTES / 2**20:.0f} MiB): download {URLS[0]} and set the key to its path."
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(
            f"eval.inception_weights={source} has sha256 {found}, expected {expected}: get the "
            "file again, or set eval.inception_sha256 if other weights are meant, whose distances "
            "are then not called FID."
        )
    arrays = torch_file.read(path)
    for name, shape in shapes.items():
        there = arrays[name].shape if name in arrays else None
        if there != shape:
            raise UserError(
                f"eval.inception_weights={source} holds {name} of shape {there}, expected {shape}: "
                "use weights of the FID's Inception-v3, pt_inception-2015-12-05."
            )
    label = "fid" if found == SHA256 else f"fd_inception_{found[:8]}"
    return Weights(label, found, {name: np.float32(arrays[name]) for name in shapes})


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
