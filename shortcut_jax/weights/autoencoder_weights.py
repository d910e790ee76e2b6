"""Weights of the autoencoder: the published files, or random ones for tests.

The parameters of `models.autoencoder.Autoencoder` are those of diffusers' `AutoencoderKL` in
another layout: `encoder.down_blocks.0.resnets.1.conv1.weight` [O, I, H, W] is
`encoder/down_blocks_0/resnets_1/conv1/kernel` [H, W, I, O].
"""

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of
from shortcut_jax.models.autoencoder import ARCHITECTURES, Architecture, Autoencoder

FILE_NAME = "diffusion_pytorch_model.safetensors"
RANDOM = "random"
FIX = f"give the path of {FILE_NAME} (python -m shortcut_jax.download sd-vae-ft-mse fetches it)"

# Names of the attention before diffusers 0.17, which the published files still have: name today.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Tensors = dict[str, np.ndarray]  # by diffusers' names, in its layout


class Weights(NamedTuple):
    """An autoencoder's parameters and what they are.

    Attributes:
      params: of `Autoencoder`, float32 numpy arrays.
      sha256: of the file (of random ones, of the tensors): latents of other weights are others.
    """

    params: dict[str, Any]
    sha256: str


def load(weights: str, kind: str = "sd") -> Weights:
    """Reads what the config keys autoencoder.weights and autoencoder.kind name.

    Args:
      weights: path of a safetensors file in diffusers' format, or of a folder with one of the
        published name; or "random" for `random_weights` of seed 0.
      kind: key of `ARCHITECTURES`.

    Raises:
      UserError: there is no such kind or file, or it is not that of such an autoencoder.
    """
    if kind not in ARCHITECTURES:
        raise UserError(
            f"autoencoder.kind={kind!r} is unknown; expected one of {', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[kind]
    path = find(weights)
    if path is None:
        tensors = random_weights(architecture, seed=0)
        content = hashlib.sha256()
        for name in sorted(tensors):
            content.update(tensors[name].tobytes())
        return Weights(to_params(tensors, architecture), content.hexdigest())
    tensors = _checked(_read(path), architecture, path)
    return Weights(to_params(tensors, architecture), sha256_of(path))


def find(weights: str) -> Path | None:
    """The file that `load` would read, None for random weights (UserError if there is none)."""
    if not weights:
        raise UserError(f"autoencoder.weights is empty; {FIX}, or set it to {RANDOM!r} for tests.")
    if weights == RANDOM:
        return None
    path = Path(weights).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"autoencoder.weights: {path} does not exist; {FIX}.")
    return path


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by diffusers' name and in its layout."""
    return {
        name: tuple(np.transpose(np.empty(leaf.shape, np.bool_), _to_torch(leaf.ndim)).shape)
        for name, _, leaf in _parameters(architecture)
    }


def to_params(tensors: Mapping[str, np.ndarray], architecture: Architecture) -> dict[str, Any]:
    """Tensors of `tensor_shapes` -> the tree of parameters, float32."""
    return unflatten_dict(
        {
            path: np.ascontiguousarray(
                np.transpose(tensors[name], _to_flax(leaf.ndim)), dtype=np.float32
            )
            for name, path, leaf in _parameters(architecture)
        }
    )


def random_weights(architecture: Architecture, seed: int) -> Tensors:
    """Weights that are the same on every machine and keep activations of order one.

    Uniform, from raw bits (`data.pipeline.random_bits`): matrices of variance 1 / inputs, biases of
    standard deviation 0.1, scales of normalisations 1 with standard deviation 0.1. None is zero or
    one throughout, so that a comparison notices each.

    Returns:
      Tensors of `tensor_shapes`, float32.
    """
    from shortcut_jax.data.pipeline import random_bits

    tensors = {}
    for name, shape in tensor_shapes(architecture).items():
        bits = random_bits(seed, name, 0, math.prod(shape))
        # The upper 24 bits: exactly a float32, in [-1, 1).
        uniform = ((bits >> 40).astype(np.float32) / 2**23 - 1).reshape(shape)
        deviation = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        scale_of_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = np.float32(deviation * math.sqrt(3)) * uniform + np.float32(scale_of_norm)
    return tensors


@functools.cache
def _parameters(
    architecture: Architecture,
) -> list[tuple[str, tuple[str, ...], jax.ShapeDtypeStruct]]:
    """(diffusers' name, path in the tree, shape) of every parameter."""
    found = []
    size = architecture.factor
    init = Autoencoder(architecture).init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    for path, leaf in flatten_dict(tree["params"]).items():
        *modules, kind = path
        parts = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
        name = ".".join([*parts, "bias" if kind == "bias" else "weight"])
        found.append((name, path, leaf))
    return found


def _to_torch(ndim: int) -> tuple[int, ...]:
    """Axes of a kernel [H, W, I, O] or [I, O] in the order of torch: O, I, H, W."""
    return {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[ndim]


def _to_flax(ndim: int) -> tuple[int, ...]:
    return tuple(np.argsort(_to_torch(ndim)).tolist())


def _read(path: Path) -> Tensors:
    """The tensors of a file, float32, under today's names."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02"):  # a zip archive or a bare pickle
        raise UserError(
            f"autoencoder.weights: {path} is a file that PyTorch pickled, which runs code when "
            f"opened; expected a safetensors file: {FIX}."
        )
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if tensor.dtype not in (np.float32, np.float16):
                    raise UserError(
                        f"autoencoder.weights: {path} has {name} as {tensor.dtype}; expected "
                        f"float32 or float16: {FIX}."
                    )
                today = _name_today(name)
                if today in tensors:
                    raise UserError(
                        f"autoencoder.weights: {path} has both {today} and the name it had before, "
                        f"of which {name} is one; expected one of the two: {FIX}."
                    )
                tensors[today] = tensor.astype(np.float32)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise UserError(
            f"autoencoder.weights: {path} cannot be read as safetensors ({error}), so it is cut or "
            f"another kind of file; expected a whole one: {FIX}."
        ) from error
    return tensors


def _name_today(name: str) -> str:
    attention = re.fullmatch(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    if attention and attention[2] in OLD_NAMES:
        return f"{attention[1]}.{OLD_NAMES[attention[2]]}.{attention[3]}"
    return name


def _checked(tensors: Tensors, architecture: Architecture, path: Path) -> Tensors:
    """The tensors in the expected shapes; UserError if there are others or too few."""
    shapes = tensor_shapes(architecture)
    missing, extra = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or extra:
        lacks = f"lacks {len(missing)}, {missing[0]} for one," if missing else "lacks none"
        has = f"has {len(extra)} others, {extra[0]} for one" if extra else "has no others"
        raise UserError(
            f"autoencoder.weights: {path} {lacks} and {has}; expected the {len(shapes)} tensors of "
            f"diffusers' AutoencoderKL of Stable Diffusion 1.x: {FIX}."
        )
    reshaped = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        # Attention converted from the original code is a 1x1 convolution: the same numbers.
        if tensor.shape not in (shape, (*shape, 1, 1)):
            raise UserError(
                f"autoencoder.weights: {path} has {name} of shape {tensor.shape}; expected "
                f"{shape}: {FIX}."
            )
        reshaped[name] = tensor.reshape(shape)
    return reshaped
