"""Attention, softmax(scale q k^T) v for every head, by each of the kernels that `model.attention`
names. To add one, add an entry to KERNELS.

They give the same values but for rounding (docs/gpu_speed.md has the bounds). The fused ones keep
neither logits nor probabilities, [heads, T, T] for each row and block, for the backward pass: they
keep q, k, v, the result and one number for each query, and compute the rest again.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from shortcut_jax.errors import UserError

LANES = 128  # of a TPU's registers: splash attention works on multiples of as many tokens


def xla(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, rows: NamedSharding | None
) -> jax.Array:
    """As XLA's operations: on every platform, differentiable in both modes; softmax in float32."""
    del rows  # the compiler knows how to split these
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="xla")


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, rows: NamedSharding | None
) -> jax.Array:
    """cuDNN's fused attention; the same call splits rows and heads over devices."""
    del rows
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    rows: NamedSharding | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, forward and backward.

    Args:
      q, k, v: [B, T, N, D], T a multiple of 128.
      scale: of the logits. The kernel has none, so it goes into q, in float32.
      rows: sharding of the rows; the compiler cannot split a kernel by itself.
      interpret: run the kernel as XLA's operations, for tests without a TPU.
    """
    # Importing it takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    tokens, heads = q.shape[1:3]
    # Blocks as large as they may be: VMEM holds a tile of 512 x 512 logits, and the fewer there
    # are the less is read twice.
    b = max(b for b in range(LANES, min(tokens, 512) + 1, LANES) if tokens % b == 0)
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.FullMask((tokens, tokens))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=b, block_kv=b, block_kv_compute=b,
            block_q_dkv=b, block_kv_dkv=b, block_kv_dkv_compute=b,
            use_fused_bwd_kernel=True,  # one kernel for the gradients of q, k and v
        ),
        interpret=interpret,
    )  # fmt: skip

    def attend(q, k, v):
        heads_first = (a.swapaxes(1, 2) for a in (q, k, v))
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)

    if rows is not None:
        # Whether results differ over the mesh is not known of a kernel: nothing to check.
        attend = jax.shard_map(
            attend, mesh=rows.mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False
        )
    return attend((q.astype(jnp.float32) * scale).astype(q.dtype), k, v)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention, and where it can be used.

    Attributes:
      attend: attend(q, k, v, scale, rows), [B, T, N, D] each -> [B, T, N, D].
      platform: kind of device it is for; "" for all.
      forward_mode: whether jax.jvp can differentiate it.
      dtypes: names of the types of q, k and v; empty for all.
      tokens: what T must be a multiple of.
      head_dim: what D must be a multiple of.
      largest_head_dim: at most; None for no limit.
    """

    attend: Callable[..., jax.Array]
    platform: str = ""
    forward_mode: bool = False
    dtypes: tuple[str, ...] = ()
    tokens: int = 1
    head_dim: int = 1
    largest_head_dim: float = math.inf

    def runs_on(self, platform: str, dtype: Any) -> bool:
        """Whether it can be used on a kind of device with q, k and v of a type."""
        fits = not self.dtypes or jnp.dtype(dtype).name in self.dtypes
        return self.platform in ("", platform) and fits


KERNELS = {
    "xla": Kernel(xla, forward_mode=True),
    # 128 holds for every GPU that cuDNN's kernel is for; from Hopper on it is 256.
    "cudnn": Kernel(cudnn, "gpu", dtypes=("bfloat16", "float16"), head_dim=8, largest_head_dim=128),
    "splash": Kernel(splash, "tpu", tokens=LANES),
}


def check(name: str, tokens: int, head_dim: int) -> None:
    """Raises UserError if the kernel cannot attend to that many tokens in heads of that width."""
    kernel = KERNELS[name]
    if tokens % kernel.tokens:
        raise UserError(
            f"model.attention={name} needs a multiple of {kernel.tokens} tokens, and there are "
            f"{tokens} (image side over model.patch_size, squared); expected another number or "
            "another kernel: set model.attention=xla."
        )
    if head_dim % kernel.head_dim or head_dim > kernel.largest_head_dim:
        raise UserError(
            f"model.attention={name} needs heads of a multiple of {kernel.head_dim} and at most "
            f"{kernel.largest_head_dim} units, and model.hidden_size / model.num_heads is "
            f"{head_dim}; expected other heads or another kernel: set model.attention=xla."
        )


def check_platform(name: str, platform: str, dtype: Any) -> None:
    """Raises UserError if the kernel does not run on that kind of device with that type."""
    kernel = KERNELS[name]
    if kernel.platform not in ("", platform):
        raise UserError(
            f"model.attention={name} is a kernel for a {kernel.platform}, and this runs on a "
            f"{platform}; expected one that is for both, xla, or another machine: set "
            "model.attention=xla."
        )
    if not kernel.runs_on(platform, dtype):
        raise UserError(
            f"model.attention={name} works in {' or '.join(kernel.dtypes)}, and the matrix "
            f"products are in {jnp.dtype(dtype).name}; expected model.dtype=bfloat16: set that, or "
            "model.attention=xla."
        )


def usable(name: str, platform: str, dtype: Any) -> str:
    """The kernel of that name if it runs there, else "xla", whose values are the same."""
    return name if KERNELS[name].runs_on(platform, dtype) else "xla"
