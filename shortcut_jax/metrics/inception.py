"""Inception-v3 as the FID uses it: the graph of pt_inception-2015-12-05, in float32.

It differs from the Inception-v3 of model zoos: average pools do not count their padding, the last
block pools by the maximum, there are 1008 logits and no auxiliary ones. Layers have the names of
PyTorch's port (https://github.com/mseitzer/pytorch-fid, https://github.com/toshas/torch-fidelity).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.metrics import torch_layout

SIZE = 299  # rows and columns of what the network sees
FEATURE_DIM, NUM_LOGITS = 2048, 1008
SPATIAL_CHANNELS = 7

# Float32 products on every back end: the defaults of TPUs (bfloat16) and of recent GPUs (TF32)
# move features by 1e-3 relative.
PRECISION = jax.lax.Precision.HIGHEST
# Kernels are always loaded; zeros are the quickest to make room with.
_Conv = functools.partial(
    nn.Conv, use_bias=False, precision=PRECISION, kernel_init=nn.initializers.zeros
)
_Dense = functools.partial(
    nn.Dense, use_bias=False, precision=PRECISION, kernel_init=nn.initializers.zeros
)


_ONE_COLUMN = ((0, 0), (0, 1))


# ---------------------------------------------------------------------- the network, as a table


class Conv(NamedTuple):
    """Convolution without bias, batch normalisation, ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _downsample(name: str, width: int) -> Conv:
    return Conv(name, width, (3, 3), stride=2, padding="VALID")


def _max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


_average = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)
_maximum = functools.partial(_max_pool, stride=1, padding="SAME")
_halve = functools.partial(_max_pool, stride=2, padding="VALID")

Pool = Callable[[jax.Array], jax.Array]
# A step is a convolution, a pool, or a pair of convolutions of the same input, side by side.
Step = Conv | Pool | tuple[Conv, Conv]
Branch = tuple[Step, ...]


def _block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (_average, Conv("branch_pool", pooled)),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        (_downsample("branch3x3", 384),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            _downsample("branch3x3dbl_3", 96),
        ),
        (_halve,),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (_average, Conv("branch_pool", 192)),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3_1", 192), _downsample("branch3x3_2", 320)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            _downsample("branch7x7x3_4", 192),
        ),
        (_halve,),
    )


def _block_e(pool: Pool) -> tuple[Branch, ...]:
    def fork(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


STEM: tuple[Conv | Pool, ...] = (
    _downsample("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
    _halve,
)
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(_average),
    "Mixed_7c": _block_e(_maximum),  # an average in every other Inception-v3
}
# What ADM's evaluator calls mixed_6/conv:0 is the first branch of this block.
SPATIAL_BLOCK = "Mixed_6d"


class ConvUnit(nn.Module):
    """A `Conv` with its parameters."""

    conv: Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, width, kernel, stride, padding = self.conv
        columns = x.shape[2]
        conv = functools.partial(_Conv, width, kernel, stride, name="conv")
        if padding == "VALID":
            # XLA of jax 0.10 takes up to 2.5 times as long for a convolution without any padding on
            # a CPU. So one column is added, and what it made is cut off.
            x = conv(_ONE_COLUMN)(x)[:, :, : (columns - kernel[1]) // stride + 1]
        else:
            x = conv(padding)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


class Block(nn.Module):
    """Branches over the same input, joined along the channels."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([_apply(branch, x) for branch in self.branches], axis=-1)


class InceptionV3(nn.Module):
    """The whole network."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Scaled images [n, 299, 299, 3], float32, to

        features: [n, 2048], the pooled ones of the FID.
        spatial: [n, 17 * 17 * 7], the first 7 channels of `SPATIAL_BLOCK`, row by row, as ADM's
            evaluator takes them for its sFID.
        logits_unbiased, logits: [n, 1008], without and with the bias. The Inception score of
            TensorFlow's graph has none.
        """
        x = _apply(STEM, x)
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        features = x.mean(axis=(1, 2))
        unbiased = _Dense(NUM_LOGITS, name="fc")(features)
        bias = self.param("fc_bias", nn.initializers.zeros, (NUM_LOGITS,))
        return {
            "features": features,
            "spatial": spatial,
            "logits_unbiased": unbiased,
            "logits": unbiased + bias,
        }


def _apply(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    """Applies steps in turn. Called in a compact method, whose module owns the parameters."""
    for step in steps:
        if isinstance(step, Conv):
            x = ConvUnit(step, name=step.name)(x)
        elif isinstance(step, tuple):
            x = jnp.concatenate([ConvUnit(conv, name=conv.name)(x) for conv in step], axis=-1)
        else:
            x = step(x)
    return x


# ---------------------------------------------------------------------- weights by PyTorch's names


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """PyTorch's name of every array -> its shape there."""
    return torch_layout.weight_shapes(_shapes(), _torch_name)


def to_variables(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `InceptionV3` from arrays with PyTorch's names, shapes as `weight_shapes`."""
    return torch_layout.to_variables(_shapes(), _torch_name, arrays)


def _shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    return torch_layout.variable_shapes(InceptionV3(), SIZE)


_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _torch_name(path: tuple[str, ...]) -> str:
    """("params", "Mixed_5b", "branch1x1", "bn", "scale") -> "Mixed_5b.branch1x1.bn.weight"."""
    *modules, leaf = path[1:]
    return "fc.bias" if leaf == "fc_bias" else ".".join([*modules, _TORCH_LEAF.get(leaf, leaf)])
