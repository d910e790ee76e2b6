"""The features of the FID: images of any size to what Inception-v3 sees, and its extractor."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shortcut_jax.metrics import inception
from shortcut_jax.metrics import inception_weights as weights_lib
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.protocols import INCEPTION, Protocol

SIZE = inception.SIZE
# Images per call of the compiled network, on each device.
BATCH = 32


# ---------------------------------------------------------------------- what the network sees


def interpolation_matrix(size: int, rule: str) -> np.ndarray:
    """Bilinear interpolation from `size` to `SIZE` samples: float32 [SIZE, size].

    Without antialiasing, places computed in float32, as those whose numbers this must give do it.

    Args:
        size: of the image along this axis.
        rule: "corner", place i of the output is place i * scale of the input (TensorFlow 1 without
            align_corners); or "half_pixel", the centres of pixels are at i + 1/2 (PyTorch).
    """
    scale = np.float32(size) / np.float32(SIZE)
    place = np.arange(SIZE, dtype=np.float32)
    if rule == "half_pixel":
        half = np.float32(0.5)
        place = np.maximum((place + half) * scale - half, np.float32(0))
    else:
        place = place * scale
    low = np.minimum(place.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = place - low.astype(np.float32)
    matrix = np.zeros((SIZE, size), np.float32)
    rows = np.arange(SIZE)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def preprocess(images: jax.Array, protocol: Protocol) -> jax.Array:
    """Grey levels [n, H, W, 3] -> float32 [n, 299, 299, 3], resized and scaled."""
    rows, columns = (interpolation_matrix(size, protocol.rule) for size in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum("ph,nhwc->npwc", rows, x, precision=inception.PRECISION)
    x = jnp.einsum("qw,npwc->npqc", columns, x, precision=inception.PRECISION)
    return protocol.scale(x)


# ---------------------------------------------------------------------- the extractor


def load_extractor(
    name: str, protocol: Protocol = INCEPTION["adm"], **inception_weights: str
) -> Extractor:
    """The extractor of the FID, on all devices of this process.

    Args:
        name: "inception".
        protocol: of `protocols.INCEPTION`.
        **inception_weights: see `inception_weights.load`.

    Raises:
        UserError: the weights are missing or not those asked for.
    """
    weights = weights_lib.load(inception.weight_shapes(), **inception_weights)
    return build_extractor(weights, protocol, BATCH, jax.local_devices())


def build_extractor(
    weights: weights_lib.Weights, protocol: Protocol, batch: int, devices: Sequence[jax.Device]
) -> Extractor:
    """Extractor that gives each of the devices `batch` images at a time."""
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    variables = jax.device_put(inception.to_variables(weights.arrays), whole)
    # Two programs, so that the large one is the same for every size of image.
    resize = jax.jit(
        functools.partial(preprocess, protocol=protocol), in_shardings=rows, out_shardings=rows
    )
    network = jax.jit(inception.InceptionV3().apply, in_shardings=(whole, rows), out_shardings=rows)
    return Extractor(
        name="inception",
        weights=weights.name,
        protocol=protocol,
        image_shape=(None, None, 3),
        feature_dim=inception.FEATURE_DIM,
        sha256=weights.sha256,
        info={},
        batch=batch * len(devices),
        forward=lambda images: network(variables, resize(images)),
    )
