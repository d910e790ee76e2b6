"""The features of the FID: images of any size to what Inception-v3 sees, and its extractor."""

import functools
from collections.abc import Sequence

import jax

from shortcut_jax.metrics import data_parallel, inception
from shortcut_jax.metrics import inception_weights as weights_lib
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.protocols import INCEPTION, Protocol
from shortcut_jax.metrics.resize import resize

SIZE = inception.SIZE
# Images per call of the compiled network, on each device.
BATCH = 32


# ---------------------------------------------------------------------- what the network sees


def preprocess(images: jax.Array, protocol: Protocol) -> jax.Array:
    """Grey levels [n, H, W, 3] -> float32 [n, 299, 299, 3], resized and scaled."""
    return protocol.scale(resize(images, SIZE, protocol.rule))


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
    variables = inception.to_variables(weights.arrays)
    prepare = functools.partial(preprocess, protocol=protocol)
    network = inception.InceptionV3().apply
    return Extractor(
        name="inception",
        weights=weights.name,
        protocol=protocol,
        image_shape=(None, None, 3),
        feature_dim=inception.FEATURE_DIM,
        sha256=weights.sha256,
        info={},
        batch=batch * len(devices),
        forward=data_parallel.compile_forward(prepare, network, variables, devices),
    )
