"""Attention as a Pallas kernel for TPUs, for rows of so few tokens that all of one is at hand.

A program of the kernel has one row of the batch: q, k and v of all its heads as the product with
the weights leaves them, [T, 3NH], and in turn every head's logits, [T, T]. These stay in the core's
own memory (VMEM), forward and backward, and nothing is brought into another layout on the way.
Flash attention (Dao et al. 2022) is for rows that do not fit; with all of a row there is no running
maximum, and the backward pass needs nothing of the forward pass but q, k and v.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Of products of two matrices: the axes that are summed over.
AB, ABT, ATB = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def attend(qkv: jax.Array, heads: int, scale: float, interpret: bool = False) -> jax.Array:
    """softmax(scale q k^T) v of every head; logits and softmax in float32.

    Args:
      qkv: [B, T, 3h]; q, k and v one after the other, of each its heads.
      heads: how many.
      scale: of the logits.
      interpret: run the kernel as XLA's operations, for tests without a TPU.

    Returns:
      [B, T, h] of the type of qkv.
    """
    out = jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)
    kernel = functools.partial(_forward, heads=heads, scale=scale)
    return _by_rows(kernel, (qkv,), out, 2, heads, interpret)


def _attend_fwd(qkv, heads, scale, interpret):
    return attend(qkv, heads, scale, interpret), qkv


def _attend_bwd(heads, scale, interpret, qkv, g):
    out = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
    kernel = functools.partial(_backward, heads=heads, scale=scale)
    return (_by_rows(kernel, (qkv, g), out, 5, heads, interpret),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _by_rows(
    kernel: Callable[..., None],
    inputs: tuple[jax.Array, ...],
    out: jax.ShapeDtypeStruct,
    products: int,
    heads: int,
    interpret: bool,
) -> jax.Array:
    """Runs a kernel on every row; `products` is how many of [T, T] with [T, D] a head takes."""
    rows, tokens = out.shape[:2]
    width = inputs[0].shape[-1] // 3
    cost = pl.CostEstimate(
        flops=products * 2 * rows * tokens**2 * width,
        transcendentals=rows * heads * tokens**2,
        bytes_accessed=out.dtype.itemsize * (out.size + sum(a.size for a in inputs)),
    )

    def whole_row(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, *a.shape[1:]), lambda row: (row, 0, 0))

    return pl.pallas_call(
        kernel,
        grid=(rows,),
        in_specs=[whole_row(a) for a in inputs],
        out_specs=whole_row(out),
        out_shape=out,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(*inputs)


def _forward(qkv: Any, out: Any, *, heads: int, scale: float) -> None:
    """qkv: [1, T, 3NH] -> out: [1, T, NH]."""
    for head in range(heads):
        columns = _columns(out.shape[-1], heads, head)
        q, k, v = (qkv[part] for part in columns)
        p = _softmax(_product(q, k, ABT) * scale)
        out[columns[0]] = _product(p.astype(v.dtype), v, AB).astype(out.dtype)


def _backward(qkv: Any, g: Any, out: Any, *, heads: int, scale: float) -> None:
    """qkv: [1, T, 3NH] and the gradient g [1, T, NH] of the result -> out: that of qkv."""
    for head in range(heads):
        columns = _columns(g.shape[-1], heads, head)
        q, k, v = (qkv[part] for part in columns)
        dy = g[columns[0]]
        p = _softmax(_product(q, k, ABT) * scale)
        dp = _product(dy, v, ABT)
        dlogits = p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))
        dlogits = (dlogits * scale).astype(q.dtype)
        dv = _product(p.astype(v.dtype), dy, ATB)
        gradients = (_product(dlogits, k, AB), _product(dlogits, q, ATB), dv)
        for part, gradient in zip(columns, gradients, strict=True):
            out[part] = gradient.astype(out.dtype)


def _columns(width: int, heads: int, head: int) -> list[tuple[Any, ...]]:
    """Where a head's q, k and v are in [1, T, 3 width]; its result is where its q is."""
    size = width // heads
    starts = (head * size, width + head * size, 2 * width + head * size)
    return [(0, slice(None), slice(start, start + size)) for start in starts]


def _softmax(logits: jax.Array) -> jax.Array:
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)
