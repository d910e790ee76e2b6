"""The autoencoder of Stable Diffusion 1.x (kl-f8): images <-> latents of 1/8 the height and width.

The network of diffusers' `AutoencoderKL` (Rombach et al. 2022, https://arxiv.org/abs/2112.10752),
channels last. Submodules carry diffusers' names, so that `autoencoder_weights` finds the tensor of
each parameter by rule.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from shortcut_jax.errors import UserError

# What latents are multiplied with so that their standard deviation is about 1: the `scaling_factor`
# of Stable Diffusion 1.x. `encode` and `decode` work on latents without it.
SCALE = 0.18215

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips to it, too


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of an autoencoder.

    Attributes:
      channels: of each level, from the image down; every level but the last halves the resolution.
      layers: residual blocks per level of the encoder; the decoder has one more.
      latent_channels: of the latents.
      groups: of every group normalisation; divides all `channels`.
    """

    channels: tuple[int, ...]
    layers: int
    latent_channels: int
    groups: int

    @property
    def factor(self) -> int:
        """Height (width) of an image over that of its latents."""
        return 2 ** (len(self.channels) - 1)


SD = Architecture(channels=(128, 256, 512, 512), layers=2, latent_channels=4, groups=32)
TINY = Architecture(channels=(8, 8, 16, 16), layers=1, latent_channels=4, groups=4)  # for tests

ARCHITECTURES = {"sd": SD, "tiny": TINY}


def encode(
    params: Any, images: jax.Array, architecture: Architecture = SD, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The posterior of the latents of images, a normal distribution without correlations.

    Args:
      params: of `Autoencoder` (see `autoencoder_weights.load`).
      images: [B, H, W, 3] in [-1, 1]; H and W divisible by `architecture.factor`.
      dtype: of the convolutions and products. float32 means float32 on every back end, not TF32 or
        bfloat16 passes; normalisation statistics and softmax are float32 always.

    Returns:
      Mean and logarithm of the variance, each [B, H/8, W/8, 4] float32, not scaled by `SCALE`.

    Raises:
      UserError: H or W cannot be divided.
    """
    height, width = images.shape[1:3]
    if height % architecture.factor or width % architecture.factor:
        raise UserError(
            f"The autoencoder got images of {height}x{width} pixels; expected multiples of "
            f"{architecture.factor}: crop or resize them, e.g. with data.image_size."
        )
    module = Autoencoder(architecture, dtype)
    return module.apply({"params": params}, images, method=module.encode)  # type: ignore[return-value]


def decode(
    params: Any, latents: jax.Array, architecture: Architecture = SD, dtype: Any = jnp.float32
) -> jax.Array:
    """Images of latents.

    Args:
      params, dtype: as in `encode`.
      latents: [B, h, w, 4], not scaled: divide what is scaled by `SCALE` first.

    Returns:
      [B, 8h, 8w, 3] float32, about in [-1, 1] but not clipped.
    """
    module = Autoencoder(architecture, dtype)
    return module.apply({"params": params}, latents, method=module.decode)  # type: ignore[return-value]


class Autoencoder(nn.Module):
    """Encoder and decoder in one tree of parameters."""

    architecture: Architecture
    dtype: Any = jnp.float32  # of the products; parameters are float32

    def setup(self) -> None:
        latent = self.architecture.latent_channels
        self.encoder = Encoder(self.architecture, self.dtype)
        self.quant_conv = _conv(2 * latent, 1, self.dtype)
        self.post_quant_conv = _conv(latent, 1, self.dtype)
        self.decoder = Decoder(self.architecture, self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, 3] -> mean and log-variance [B, H/8, W/8, 4] float32."""
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, 4] -> [B, 8h, 8w, 3] float32."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Decodes the mean of the posterior: [B, H, W, 3] -> the same."""
        return self.decode(self.encode(images)[0])


class Encoder(nn.Module):
    """[B, H, W, 3] -> [B, H/8, W/8, 8]."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.architecture
        x = _conv(a.channels[0], 3, self.dtype, name="conv_in")(x)
        for i, width in enumerate(a.channels):
            last = i == len(a.channels) - 1
            x = DownBlock(a, self.dtype, width, downsample=not last, name=f"down_blocks_{i}")(x)
        x = MidBlock(a, self.dtype, name="mid_block")(x)
        x = nn.silu(_norm(a, name="conv_norm_out")(x))
        return _conv(2 * a.latent_channels, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, 4] -> [B, 8h, 8w, 3]."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.architecture
        x = _conv(a.channels[-1], 3, self.dtype, name="conv_in")(x)
        x = MidBlock(a, self.dtype, name="mid_block")(x)
        for i, width in enumerate(reversed(a.channels)):
            last = i == len(a.channels) - 1
            x = UpBlock(a, self.dtype, width, upsample=not last, name=f"up_blocks_{i}")(x)
        x = nn.silu(_norm(a, name="conv_norm_out")(x))
        return _conv(3, 3, self.dtype, name="conv_out")(x)


class DownBlock(nn.Module):
    """Residual blocks of one level, then a convolution that halves the resolution."""

    architecture: Architecture
    dtype: Any
    width: int
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.architecture.layers):
            x = ResnetBlock(self.architecture, self.dtype, self.width, name=f"resnets_{i}")(x)
        return Downsample(self.dtype, name="downsamplers_0")(x) if self.downsample else x


class UpBlock(nn.Module):
    """Residual blocks of one level, then doubling of the resolution and a convolution."""

    architecture: Architecture
    dtype: Any
    width: int
    upsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.architecture.layers + 1):
            x = ResnetBlock(self.architecture, self.dtype, self.width, name=f"resnets_{i}")(x)
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.upsample else x


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a, width = self.architecture, x.shape[-1]
        x = ResnetBlock(a, self.dtype, width, name="resnets_0")(x)
        x = Attention(a, self.dtype, name="attentions_0")(x)
        return ResnetBlock(a, self.dtype, width, name="resnets_1")(x)


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a skip path, which is 1x1 where the width changes."""

    architecture: Architecture
    dtype: Any
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.architecture, name="norm1")(x))
        h = _conv(self.width, 3, self.dtype, name="conv1")(h)
        h = nn.silu(_norm(self.architecture, name="norm2")(h))
        h = _conv(self.width, 3, self.dtype, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.dtype, name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention of one head over all pixels, with a skip path."""

    architecture: Architecture
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, c = x.shape
        precision = _precision(self.dtype)
        dense = functools.partial(nn.Dense, c, dtype=self.dtype, precision=precision)
        einsum = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=jnp.float32
        )
        h = _norm(self.architecture, name="group_norm")(x).reshape(batch, height * width, c)
        q, k, v = (dense(name=name)(h) for name in ("to_q", "to_k", "to_v"))  # [B, HW, C] each
        weights = nn.softmax(einsum("bqc,bkc->bqk", q, k) / math.sqrt(c))
        h = einsum("bqk,bkc->bqc", weights.astype(self.dtype), v)
        return x + dense(name="to_out_0")(h).reshape(x.shape)


class Downsample(nn.Module):
    """Convolution of stride 2, with a row and a column of zeros below and on the right only."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1))
        return _conv(x.shape[-1], 3, self.dtype, strides=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return _conv(x.shape[-1], 3, self.dtype, name="conv")(x)


def _conv(features: int, size: int, dtype: Any, padding: Any = "SAME", **kwargs: Any) -> nn.Conv:
    return nn.Conv(
        features, (size, size), padding=padding, dtype=dtype, precision=_precision(dtype), **kwargs
    )


def _norm(architecture: Architecture, *, name: str) -> nn.GroupNorm:
    # Not E[x^2] - E[x]^2, which loses digits where the mean is far from zero.
    return nn.GroupNorm(
        architecture.groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name
    )


def _precision(dtype: Any) -> jax.lax.Precision | None:
    # The defaults of TPUs (bfloat16) and recent GPUs (TF32) are not float32.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
