"""DINOv2 ViT-L/14 and its features of images of any size, for FD-DINOv2.

The network is the one without registers of https://github.com/facebookresearch/dinov2 (Oquab et
al., https://arxiv.org/abs/2304.07193), in float32. FD-DINOv2 is the Fréchet distance of its
features: Stein et al., https://arxiv.org/abs/2306.04675.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from shortcut_jax.metrics import data_parallel, torch_layout
from shortcut_jax.metrics import dinov2_weights as weights_lib
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.protocols import DINOV2, PILLOW, Protocol
from shortcut_jax.metrics.resize import resize, torch_bicubic

SIZE = 224  # rows and columns of what the network sees
PATCH = 14
GRID = SIZE // PATCH
# Rows and columns of patches that position embeddings were trained for.
TRAINED_GRID = 518 // PATCH
# Images per call of the compiled network, on each device.
BATCH = 32

# Float32 products on every back end; see `inception.PRECISION`.
PRECISION = jax.lax.Precision.HIGHEST
# Parameters are always loaded; zeros are the quickest to make room with.
_zeros = nn.initializers.zeros
_Dense = functools.partial(nn.Dense, precision=PRECISION, kernel_init=_zeros)
# Variances as means of squared differences: activations with a large mean keep their digits.
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


# ---------------------------------------------------------------------- the network


class Attention(nn.Module):
    """Self-attention of all tokens, [n, tokens, width] -> the same."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, tokens, width = x.shape
        qkv = _Dense(3 * width, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(n, tokens, 3, self.heads, -1), 2, 0)
        x = nn.dot_product_attention(q, k, v, precision=PRECISION)
        return _Dense(width, name="proj")(x.reshape(n, tokens, width))


class MLP(nn.Module):
    """Two layers, four times as wide between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(_Dense(4 * width, name="fc1")(x), approximate=False)
        return _Dense(width, name="fc2")(x)


class Block(nn.Module):
    """Attention, then an MLP, each with a gain per channel (LayerScale) and a residual."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = functools.partial(self.param, init_fn=_zeros, shape=x.shape[-1:])
        attended = Attention(self.heads, name="attn")(_LayerNorm(name="norm1")(x))
        x = x + gain("ls1") * attended
        return x + gain("ls2") * MLP(name="mlp")(_LayerNorm(name="norm2")(x))


class VisionTransformer(nn.Module):
    """ViT-L/14; smaller ones are for tests."""

    depth: int = 24
    width: int = 1024
    heads: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Scaled images [n, 224, 224, 3], float32, to

        features: [n, width], the class token after the last normalisation.
        """
        x = nn.Conv(
            self.width, (PATCH, PATCH), (PATCH, PATCH), "VALID",
            precision=PRECISION, kernel_init=_zeros, name="patch_embed",
        )(x)  # fmt: skip
        x = x.reshape(len(x), GRID**2, self.width)
        class_token = self.param("cls_token", _zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, self.width)), x], axis=1)
        places = self.param("pos_embed", _zeros, (1, 1 + TRAINED_GRID**2, self.width))
        x = x + resize_places(places)
        for i in range(self.depth):
            x = Block(self.heads, name=f"blocks_{i}")(x)
        return {"features": _LayerNorm(name="norm")(x)[:, 0]}


def resize_places(places: jax.Array) -> jax.Array:
    """Position embeddings of 37x37 patches to those of 16x16: [1, 1 + 37², d] -> [1, 1 + 16², d].

    Bicubic and not antialiased. The scale is that of 16.1 rows instead of 16: the published code
    adds 0.1 so that rounding cannot lose a row, and PyTorch samples where that scale says.
    """
    grid = places[0, 1:].reshape(TRAINED_GRID, TRAINED_GRID, -1)
    matrix = torch_bicubic(TRAINED_GRID, GRID, TRAINED_GRID / (GRID + 0.1)).astype(np.float32)
    grid = jnp.einsum("ph,hwd->pwd", matrix, grid, precision=PRECISION)
    grid = jnp.einsum("qw,pwd->pqd", matrix, grid, precision=PRECISION)
    return jnp.concatenate([places[:, :1], grid.reshape(1, GRID**2, -1)], axis=1)


# ---------------------------------------------------------------------- what the network sees


def preprocess(images: jax.Array, protocol: Protocol) -> jax.Array:
    """Grey levels [n, H, W, 3] -> float32 [n, 224, 224, 3], resized and scaled, not clipped."""
    x = images if protocol.rule == PILLOW else resize(images, SIZE, protocol.rule)
    return protocol.scale(x.astype(jnp.float32))


def pillow_resize(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] -> uint8 [n, 224, 224, 3], by Pillow, which rounds after each axis."""
    return np.stack(
        [
            np.asarray(Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            for i in images
        ]
    )


# ---------------------------------------------------------------------- the extractor


def load_extractor(
    name: str, protocol: Protocol = DINOV2["edm2"], **dinov2_weights: str
) -> Extractor:
    """The extractor of FD-DINOv2, on all devices of this process.

    Args:
        name: "dinov2".
        protocol: of `protocols.DINOV2`.
        **dinov2_weights: see `dinov2_weights.load`.

    Raises:
        UserError: the weights are missing or not those asked for.
    """
    network = VisionTransformer()
    weights = weights_lib.load(weight_shapes(network), **dinov2_weights)
    return build_extractor(network, weights, protocol, BATCH, jax.local_devices())


def build_extractor(
    network: VisionTransformer,
    weights: weights_lib.Weights,
    protocol: Protocol,
    batch: int,
    devices: Sequence[jax.Device],
) -> Extractor:
    """Extractor that gives each of the devices `batch` images at a time."""
    variables = to_variables(network, weights.arrays)
    prepare = functools.partial(preprocess, protocol=protocol)
    forward = data_parallel.compile_forward(prepare, network.apply, variables, devices)
    by_pillow = protocol.rule == PILLOW
    return Extractor(
        name="dinov2",
        weights=weights.name,
        protocol=protocol,
        image_shape=(None, None, 3),
        feature_dim=network.width,
        sha256=weights.sha256,
        info={},
        batch=batch * len(devices),
        forward=(lambda images: forward(pillow_resize(images))) if by_pillow else forward,
    )


# ---------------------------------------------------------------------- weights by PyTorch's names


def weight_shapes(network: VisionTransformer) -> dict[str, tuple[int, ...]]:
    """PyTorch's name of every array -> its shape there."""
    return torch_layout.weight_shapes(torch_layout.variable_shapes(network, SIZE), _torch_name)


def to_variables(network: VisionTransformer, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of a network from arrays with PyTorch's names, shapes as `weight_shapes`."""
    shapes = torch_layout.variable_shapes(network, SIZE)
    return torch_layout.to_variables(shapes, _torch_name, arrays)


_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "ls1": "ls1.gamma", "ls2": "ls2.gamma"}


def _torch_name(path: tuple[str, ...]) -> str:
    """("params", "blocks_3", "attn", "qkv", "kernel") -> "blocks.3.attn.qkv.weight"."""
    *modules, leaf = path[1:]
    name = ".".join([*modules, _TORCH_LEAF.get(leaf, leaf)])
    return name.replace("blocks_", "blocks.").replace("patch_embed.", "patch_embed.proj.")
