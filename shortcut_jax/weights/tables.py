"""What the tables of names share: flat names, checks of what is there, and sizes from shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from shortcut_jax.errors import UserError
from shortcut_jax.models import dit

Flat = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of a DiT's weights say of it. (The number of heads they do not say.)"""

    patch_size: int
    hidden_size: int
    depth: int
    mlp_ratio: float
    channels: int  # of images or latents
    num_classes: int

    def name(self) -> str | None:
        """SIZE/PATCH, if it is a DiT of Peebles & Xie's table 1, whose number of heads is known."""
        for name, size in dit.SIZES.items():
            same = (size["hidden_size"], size["depth"]) == (self.hidden_size, self.depth)
            if same and self.mlp_ratio == 4.0 and self.patch_size in dit.PATCHES:
                return f"{name}/{self.patch_size}"
        return None

    def model(self) -> dict[str, Any]:
        """The keys of config.model that they decide."""
        keys = ("patch_size", "hidden_size", "depth", "mlp_ratio")
        return {key: getattr(self, key) for key in keys}


class Source:
    """Named arrays of a file, each to be taken once, with its shape checked.

    Args:
      arrays: flat names, joined by `separator`.
      name: of the file, for sentences.
      separator: between the parts of a name.
    """

    def __init__(self, arrays: Mapping[str, Any], name: str, separator: str):
        self.arrays, self.name, self.separator = dict(arrays), name, separator
        self._left = set(arrays)

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """The shape of an entry (UserError if it is missing or has other than `ndim` axes)."""
        found = self._find(key)
        if found.ndim != ndim:
            raise self._wrong(f"{key} of shape {found.shape} where {ndim} axes are expected")
        return found.shape

    def take(self, key: str, *shape: int) -> np.ndarray:
        """The entry as float32 of that shape.

        Raises:
          UserError: it is missing, or has another shape or no finite real numbers.
        """
        found = self._find(key)
        if found.shape != shape:
            raise self._wrong(f"{key} of shape {found.shape} where {shape} is expected")
        if found.dtype.kind not in "fV":  # V: bfloat16, as numpy sees it
            raise self._wrong(f"{key} of type {found.dtype} where floats are expected")
        value = np.ascontiguousarray(found, np.float32)
        if not np.isfinite(value).all():
            raise self._wrong(f"values in {key} that are not finite")
        self._left.discard(key)
        return value

    def count(self, prefix: str) -> int:
        """How many numbered parts `prefix`0, `prefix`1 ... there are."""
        n = 0
        while any(key.startswith(f"{prefix}{n}{self.separator}") for key in self.arrays):
            n += 1
        return n

    def finish(self) -> None:
        """Refuses a file that holds more than was taken (UserError)."""
        if self._left:
            extra = ", ".join(sorted(self._left)[:3])
            raise self._wrong(f"{len(self._left)} entries that are not of this network ({extra})")

    def _find(self, key: str) -> np.ndarray:
        if not isinstance(self.arrays.get(key), np.ndarray):
            raise self._wrong(f"no array {key}")
        return self.arrays[key]

    def _wrong(self, found: str) -> UserError:
        return UserError(
            f"{self.name} holds {found}; expected the weights of a DiT as docs/checkpoints.md "
            "lists them: give the file of such a network."
        )


def flatten(tree: Mapping[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split(separator)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def layer(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters of a dense layer, kernel [in, out]."""
    return {"kernel": kernel, "bias": bias}
