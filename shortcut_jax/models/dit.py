"""Diffusion transformer (Peebles & Xie 2023) conditioned on time t, step size d and class.

The defaults are DiT with a second time-like embedding for d. Each way in which the released code of
the shortcut paper differs is a field (docs/differences.md), so that its weights give its outputs.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from shortcut_jax import layers
from shortcut_jax.models import attention as attention_lib

# name: hidden size, depth, heads (DiT, table 1)
SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCHES = (2, 4, 8)

TABLE_INIT = nn.initializers.normal(0.02)  # embedding tables and the time and step-size MLPs

# What of a block's forward pass is kept for its backward pass; the rest is computed again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    # The products with weights, which are most of the work, biases added, and what the kernel of
    # attention names so (`attention.pallas`).
    "dots": jax.checkpoint_policies.save_only_these_names(attention_lib.KEPT),
}


class DiT(nn.Module):
    """Predicts the shortcut s(x, t, d | label), an image of the shape of x."""

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    attention_scale: Literal["sqrt", "linear"] = "sqrt"  # 1/sqrt(head_dim) | 1/head_dim
    time_scale: float = 1000.0  # what t (and d) are multiplied with before the sinusoids
    step_embedding: Literal["d", "log2"] = "d"  # d like t | the integer log2(1/d), unscaled
    modulation_init: Literal["zero", "xavier"] = "zero"  # adaLN-Zero | the released code's
    max_level: int = 7  # log2 M: the token of d = 0 under "log2"
    ignore_step: bool = False  # methods without a step size see a constant
    residual_barrier: bool = False  # same values; see Block._residual
    remat: Literal["none", "full", "dots"] = "none"  # same values; see REMAT
    scan_layers: bool = False  # same values; one traced block, parameters as in `layers.stack`
    attention: str = "xla"  # same values; see attention.KERNELS
    rows: Any = None  # sharding of the rows, held on to between blocks; None leaves it open
    dtype: Any = jnp.float32  # of the matrix products; parameters are float32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, d: jax.Array, labels: jax.Array) -> jax.Array:
        """Applies the network.

        Args:
          x: [B, H, W, C] float32, H = W divisible by patch_size.
          t: [B] float32 in [0, 1].
          d: [B] float32 in [0, 1]; 0 asks for the instantaneous velocity.
          labels: [B] int32 in [0, num_classes]; num_classes is the null label.

        Returns:
          [B, H, W, C] float32.
        """
        channels, p = x.shape[-1], self.patch_size
        grid = x.shape[1] // p

        tokens = patchify(x, p)  # [B, T, p*p*C], T = grid**2
        tokens = dense(self.hidden_size, self.dtype, name="patch_embed")(tokens)  # [B, T, h]
        tokens = tokens + sincos_position_embedding(self.hidden_size, grid)
        tokens = self._by_rows(tokens.astype(self.dtype))

        c = SinusoidMLP(self.hidden_size, self.dtype, name="t_embed")(t * self.time_scale)
        c += SinusoidMLP(self.hidden_size, self.dtype, name="d_embed")(self._step_input(d))
        c += nn.Embed(
            self.num_classes + 1, self.hidden_size, embedding_init=TABLE_INIT, name="label_embed"
        )(labels)
        c = self._by_rows(nn.silu(c))  # [B, h] float32

        block = functools.partial(
            self._block(),
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            attention_scale=self.attention_scale,
            modulation_init=self.modulation_init,
            residual_barrier=self.residual_barrier,
            attention=self.attention,
            rows=self.rows,
            dtype=self.dtype,
        )
        if self.scan_layers:
            tokens, _ = nn.scan(
                lambda one, x, c: (self._by_rows(one(x, c)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )(block(name=layers.STACKED), tokens, c)
        else:
            for i in range(self.depth):
                tokens = self._by_rows(block(name=f"{layers.PREFIX}{i}")(tokens, c))

        shift, scale = modulation(2, self.hidden_size, "zero", self.dtype, name="modulation")(c)
        tokens = modulate(layer_norm(tokens), shift, scale).astype(self.dtype)
        tokens = dense(p * p * channels, self.dtype, init="zero", name="output")(tokens)
        return unpatchify(tokens, p, grid).astype(jnp.float32)

    def _by_rows(self, x: jax.Array) -> jax.Array:
        # Else the compiler may split activations like the parameters they meet under fsdp, and
        # hold every row on every device.
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)

    def _block(self) -> type[nn.Module]:
        if self.remat == "none":
            return Block
        # A loop's body is not merged with another's (CSE) as unrolled blocks would be.
        return nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan_layers)

    def _step_input(self, d: jax.Array) -> jax.Array:
        if self.ignore_step:
            return jnp.zeros_like(d)
        if self.step_embedding == "d":
            return d * self.time_scale
        # The released code gives one token, log2 M, to d = 0 and to d = 1/M.
        return jnp.minimum(-jnp.log2(jnp.maximum(d, 2.0**-self.max_level)), self.max_level)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning (adaLN)."""

    num_heads: int
    mlp_ratio: float
    attention_scale: str
    modulation_init: str
    residual_barrier: bool
    attention: str
    rows: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x: [B, T, h] of `dtype`; c: [B, h] float32. Returns [B, T, h]."""
        h = x.shape[-1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
            6, h, self.modulation_init, self.dtype, name="modulation"
        )(c)

        y = modulate(layer_norm(x), shift_a, scale_a).astype(self.dtype)
        # One product for q, k and v; each third is initialised as a matrix of its own.
        qkv = dense(3 * h, self.dtype, init="thirds", name="qkv")(y)  # [B, T, 3h]
        head_dim = h // self.num_heads
        scale = 1 / head_dim if self.attention_scale == "linear" else 1 / math.sqrt(head_dim)
        y = attention_lib.KERNELS[self.attention].attend(qkv, self.num_heads, scale, self.rows)
        y = dense(h, self.dtype, name="attention_out")(y)
        x = self._residual(x + gate_a * y)

        y = modulate(layer_norm(x), shift_m, scale_m).astype(self.dtype)
        y = dense(int(h * self.mlp_ratio), self.dtype, name="mlp_in")(y)
        y = dense(h, self.dtype, name="mlp_out")(nn.gelu(y, approximate=True))
        return self._residual(x + gate_m * y)

    def _residual(self, x: jax.Array) -> jax.Array:
        # XLA's CPU back end would fuse the gradient of the residual stream of all later layers into
        # every use of it and compute it again each time: 3.5 times the time of a step.
        return jax.lax.optimization_barrier(x) if self.residual_barrier else x


class SinusoidMLP(nn.Module):
    """Embeds scalars [B] as 256 sinusoids of periods up to 10,000 and an MLP, to [B, h] float32."""

    hidden_size: int
    dtype: Any
    num_frequencies: int = 128

    @nn.compact
    def __call__(self, a: jax.Array) -> jax.Array:
        n = self.num_frequencies
        frequencies = jnp.exp(-math.log(10_000) * jnp.arange(n, dtype=jnp.float32) / n)
        angles = a.astype(jnp.float32)[:, None] * frequencies
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # [B, 256]
        x = nn.Dense(self.hidden_size, kernel_init=TABLE_INIT, dtype=self.dtype, name="in")(x)
        # float32: the sum of the embeddings conditions every block
        return nn.Dense(self.hidden_size, kernel_init=TABLE_INIT, name="out")(nn.silu(x))


class Dense(nn.Dense):
    """A dense layer whose result model.remat=dots keeps for the backward pass."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(super().__call__(x), attention_lib.KEPT)


def dense(
    features: int, dtype: Any, *, name: str, init: Literal["xavier", "thirds", "zero"] = "xavier"
) -> Dense:
    """A biased dense layer: Xavier-uniform ("thirds": three square ones side by side) or zero."""
    inits = {
        "xavier": nn.initializers.xavier_uniform(),
        "thirds": _stacked_xavier(3),
        "zero": nn.initializers.zeros,
    }
    return Dense(
        features, kernel_init=inits[init], dtype=dtype, dot_general=_product_of_rows, name=name
    )


def _product_of_rows(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """x [..., i] @ kernel [i, o], with all leading axes as one.

    XLA's CPU back end would copy what it sums over two axes, as the gradient of the kernel does,
    and then multiply three times slower.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], -1)


def _stacked_xavier(n: int) -> nn.initializers.Initializer:
    xavier = nn.initializers.xavier_uniform()

    def init(key, shape, dtype=jnp.float32):
        part = (shape[0], shape[1] // n)
        return jnp.concatenate([xavier(k, part, dtype) for k in jax.random.split(key, n)], axis=1)

    return init


def modulation(n: int, hidden_size: int, init: str, dtype: Any, *, name: str):
    """c [B, h] -> n arrays [B, 1, h]: the shifts, scales and gates of a block."""
    layer = dense(n * hidden_size, dtype, init=init, name=name)  # type: ignore[arg-type]
    return lambda c: jnp.split(layer(c)[:, None], n, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, [B, T, h] with [B, 1, h]."""
    return x * (1 + scale) + shift


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis without affine parameters; statistics and result in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


def patchify(x: jax.Array, p: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H/p)(W/p), p*p*C]."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // p, p, width // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(x: jax.Array, p: int, grid: int) -> jax.Array:
    """[B, grid*grid, p*p*C] -> [B, grid*p, grid*p, C]."""
    b, _, k = x.shape
    c = k // (p * p)
    x = x.reshape(b, grid, grid, p, p, c).swapaxes(2, 3)
    return x.reshape(b, grid * p, grid * p, c)


def sincos_position_embedding(hidden_size: int, grid: int) -> np.ndarray:
    """Fixed 2D position embedding [1, grid*grid, h] float32, as in MAE and DiT.

    Half of the channels encode the column and half the row, each as sines, then cosines.
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")

    def encode(position):
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    both = np.concatenate([encode(column), encode(row)], axis=1)
    return both[None].astype(np.float32)
