"""Variables of a flax network from arrays with PyTorch's names and axes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]
Shape = tuple[int, ...]

# Kernels are [out, in, rows, columns] or [out, in] there, [rows, columns, in, out] or [in, out]
# here. By number of axes.
_TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
_FLAX_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


@functools.cache
def variable_shapes(network: nn.Module, size: int) -> dict[Path, Shape]:
    """Path of every variable of a network for images [n, size, size, 3] -> its shape."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in flatten_dict(variables).items()}


def weight_shapes(
    shapes: Mapping[Path, Shape], torch_name: Callable[[Path], str]
) -> dict[str, Shape]:
    """PyTorch's name of every array -> its shape there."""
    return {
        torch_name(path): tuple(shape[axis] for axis in _TORCH_AXES[len(shape)])
        if path[-1] == "kernel"
        else shape
        for path, shape in shapes.items()
    }


def to_variables(
    shapes: Mapping[Path, Shape],
    torch_name: Callable[[Path], str],
    arrays: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Variables of a network from arrays with PyTorch's names, shapes as `weight_shapes`."""
    flat = {}
    for path, shape in shapes.items():
        array = arrays[torch_name(path)]
        flat[path] = array.transpose(_FLAX_AXES[len(shape)]) if path[-1] == "kernel" else array
    return unflatten_dict(flat)
