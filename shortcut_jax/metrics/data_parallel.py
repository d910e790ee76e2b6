"""Running a feature network on all devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def compile_forward(
    preprocess: Callable[[jax.Array], jax.Array],
    network: Callable[..., Any],
    variables: Any,
    devices: Sequence[jax.Device],
) -> Callable[[np.ndarray], Mapping[str, jax.Array]]:
    """images -> `network(variables, preprocess(images))`, the rows split over the devices.

    Args:
        preprocess: uint8 [n, H, W, C] -> what the network sees, [n, ...].
        network: (variables, what it sees) -> outputs [n, ...] by name.
        variables: of the network; every device gets all of them.
        devices: whose number divides n.
    """
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    variables = jax.device_put(variables, whole)
    # Two programs, so that the large one is the same for every size of image.
    prepare = jax.jit(preprocess, in_shardings=rows, out_shardings=rows)
    apply = jax.jit(network, in_shardings=(whole, rows), out_shardings=rows)
    return lambda images: apply(variables, prepare(images))
