"""Feature extractors for small data sets: classifiers trained in this repository.

They give Fréchet distances that need no download and run in seconds on a CPU. Their numbers can
only be compared with numbers of the same extractor (same sha256), and are never called FID.
"""

import functools
import hashlib
import importlib.resources
import io
import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike

from shortcut_jax.errors import UserError
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.protocols import PLAIN, Protocol

FEATURE_DIM = 64
# Images per call of the compiled network. Fixed, so that the same program computes every image.
BATCH = 256

# Float32 products on every back end: the defaults of TPUs (bfloat16) and of recent GPUs (TF32)
# move features by 1e-3 relative.
_Dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
_Conv = functools.partial(nn.Conv, precision=jax.lax.Precision.HIGHEST)


class CNN(nn.Module):
    """Three 3x3 convolutions, a 4x4 grid of local means, 64 ReLU units and a linear classifier."""

    num_classes: int
    strides: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [n, H, W, C] in [-1, 1] -> features [n, 64] and logits [n, num_classes]."""
        for i, (width, stride) in enumerate(zip((16, 32, 48), self.strides, strict=True)):
            x = nn.relu(_Conv(width, (3, 3), strides=stride, name=f"conv{i}")(x))
        cell = (x.shape[1] // 4, x.shape[2] // 4)
        x = nn.avg_pool(x, cell, strides=cell).reshape(len(x), -1)
        features = nn.relu(_Dense(FEATURE_DIM, name="hidden")(x))
        return features, _Dense(self.num_classes, name="output")(features)


class MLP(nn.Module):
    """One hidden layer of 64 ReLU units on the row-major pixels, and a linear classifier."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [n, H, W, C] in [-1, 1] -> features [n, 64] and logits [n, num_classes]."""
        features = nn.relu(_Dense(FEATURE_DIM, name="hidden")(x.reshape(len(x), -1)))
        return features, _Dense(self.num_classes, name="output")(features)


def scale_pixels(images: ArrayLike) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return PLAIN.scale(jnp.asarray(images, jnp.float32))


def load_extractor(
    name: str, protocol: Protocol = PLAIN, directory: Traversable | None = None
) -> Extractor:
    """Reads `<name>.json` and `<name>.npz` of `directory` (default: shipped with the package).

    Raises:
        UserError: a file is missing, or the weights are not those of the record.
    """
    if directory is None:
        directory = importlib.resources.files("shortcut_jax.metrics") / "weights"
    record, weights = directory / f"{name}.json", directory / f"{name}.npz"
    for file in (record, weights):
        if not file.is_file():
            raise UserError(
                f"{file} does not exist: install the package again, or make the file with "
                f"python -m shortcut_jax.metrics.train_classifier --name={name}."
            )
    info = json.loads(record.read_text(encoding="utf-8"))
    data = weights.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != info["sha256"]:
        raise UserError(
            f"{weights} has sha256 {sha256}, expected {info['sha256']} as {record.name} records: "
            "the file is damaged or was replaced; install the package again or train it again."
        )
    return build_extractor(info, data, protocol)


def build_extractor(
    info: Mapping[str, Any], weights: bytes, protocol: Protocol = PLAIN
) -> Extractor:
    """Extractor from the record and the contents of the npz file."""
    with np.load(io.BytesIO(weights), allow_pickle=False) as arrays:
        params = unflatten_dict({key: jnp.asarray(arrays[key]) for key in arrays.files}, sep="/")
    network = make_network(info["architecture"])

    @jax.jit
    def forward(params, images):
        features, logits = network.apply(
            {"params": params}, protocol.scale(images.astype(jnp.float32))
        )
        return {"features": features, "logits": logits}

    return Extractor(
        name=info["name"],
        weights="",
        protocol=protocol,
        image_shape=tuple(info["image_shape"]),
        feature_dim=FEATURE_DIM,
        sha256=hashlib.sha256(weights).hexdigest(),
        info=info,
        batch=BATCH,
        forward=functools.partial(forward, params),
    )


def make_network(architecture: Mapping[str, Any]) -> nn.Module:
    """Network of a record: {"network": "cnn" or "mlp", and the fields of that class}."""
    fields = dict(architecture)
    network = {"cnn": CNN, "mlp": MLP}[fields.pop("network")]
    # JSON has no tuples; flax wants its fields hashable.
    return network(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
