"""Weights of the networks whose activations are features: the published file, another, or random.

Needs neither JAX nor PyTorch, so that files are checked before anything is loaded, and both sides
of a comparison can make the same random weights.
"""

import dataclasses
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of
from shortcut_jax.weights import torch_file
from shortcut_jax.weights.published import PUBLISHED

# Named in place of a file: weights that measure nothing, made on the spot.
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays of a network by their PyTorch names, and what they are.

    Attributes:
        name: "" for the published file alone; what to call others.
        sha256: of the file, or of the numbers themselves if there is none.
        arrays: name -> float32 array, convolutions as [out, in, rows, columns].
    """

    name: str
    sha256: str
    arrays: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """What is known of a network before its file is read.

    Attributes:
        key: the file is named by KEY_weights in the config's section eval, its hash by KEY_sha256.
        published: key of PUBLISHED.
        what: says which network it is, in sentences.
        metric: name of the distance with the published weights, and with no other ones.
        bounds: (PyTorch's name, shape) -> least and largest random number of an array.
        surplus: pattern of names that a file may hold beside those the network needs.
    """

    key: str
    published: str
    what: str
    metric: str
    bounds: Callable[[str, tuple[int, ...]], tuple[float, float]]
    surplus: str

    @property
    def sha256(self) -> str:
        """Of the published file."""
        return PUBLISHED[self.published].sha256

    def check(self, weights: str, sha256: str = "") -> None:
        """Refuses weights that `load` would refuse for what they are named.

        Args:
            weights: path of the published file, of another one with the same names (.pth or
                .safetensors), or "random".
            sha256: that the file must have; "" for that of the published file.

        Raises:
            UserError: no file, or another hash.
        """
        if weights == RANDOM:
            return
        if not weights or not Path(weights).is_file():
            raise UserError(
                f"eval.{self.key}_weights={weights!r} is not a file; expected {self.what}: "
                f"python -m shortcut_jax.download {self.published} --out=FILE fetches it; set that "
                "key of the config file, or the flag of that name, to its path."
            )
        found, expected = sha256_of(Path(weights)), sha256 or self.sha256
        if found != expected:
            raise UserError(
                f"eval.{self.key}_weights={weights} has sha256 {found}, expected {expected}: get "
                f"the file again, or set eval.{self.key}_sha256 or that flag if other "
                f"weights are meant, whose distances are then not called {self.metric}."
            )

    def load(
        self, shapes: Mapping[str, tuple[int, ...]], weights: str, sha256: str = ""
    ) -> Weights:
        """Weights that `check` accepts.

        Args:
            shapes: what the network needs: name -> shape.
            weights, sha256: see `check`.

        Raises:
            UserError: what `check` refuses, or not the weights of this network.
        """
        self.check(weights, sha256)
        if weights == RANDOM:
            arrays = {name: self.random_array(name, shape) for name, shape in shapes.items()}
            digest = hashlib.sha256()
            for name in sorted(arrays):
                digest.update(name.encode())
                digest.update(arrays[name].tobytes())
            return Weights(RANDOM, digest.hexdigest(), arrays)
        arrays = torch_file.read(weights)
        self._check_arrays(weights, arrays, shapes)
        found = sha256 or self.sha256  # as `check` has found
        name = "" if found == self.sha256 else found[:8]
        return Weights(name, found, {n: arrays[n].astype(np.float32, copy=False) for n in shapes})

    def _check_arrays(
        self,
        weights: str,
        arrays: Mapping[str, np.ndarray],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        surplus = [name for name in arrays if name not in shapes]
        unknown = {n: None for n in surplus if not re.fullmatch(self.surplus, n)}
        for name, shape in {**shapes, **unknown}.items():
            there = arrays[name].shape if name in arrays else None
            if there != shape:
                raise UserError(
                    f"eval.{self.key}_weights={weights} holds {name} of shape {there}, expected "
                    f"{shape}: use weights of {self.what}, {self.published}."
                )

    def random_array(self, name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        """Seeded float32 numbers for one array, uniform; the same in every version of numpy."""
        # Raw bits of a bit generator are fixed by numpy's compatibility policy; draws of its
        # distributions are not.
        bits = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
        uniform = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        low, high = self.bounds(name, shape)
        return (np.float32(low) + np.float32(high - low) * uniform).reshape(shape)


def kernel_bounds(shape: tuple[int, ...]) -> tuple[float, float]:
    """Of a kernel [out, in, ...]: the scale that keeps the size of activations through ReLUs."""
    largest = math.sqrt(6 / math.prod(shape[1:]))
    return -largest, largest
