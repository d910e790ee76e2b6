"""Attention, softmax(scale q k^T) v for every head, by each of the kernels that `model.attention`
names. To add one, add an entry to KERNELS.

They give the same values but for rounding (docs/attention.md has the bounds). The fused ones keep
neither logits nor probabilities, [heads, T, T] for each row and block, for the backward pass, and
compute them again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from shortcut_jax.errors import UserError

KEPT = "kept"  # name of the results that model.remat=dots keeps for the backward pass


def xla(qkv: jax.Array, heads: int, scale: float, rows: NamedSharding | None) -> jax.Array:
    """As XLA's operations: on every platform, differentiable in both modes; softmax in float32."""
    del rows  # the compiler knows how to split these
    return _dot_product(qkv, heads, scale, "xla")


def cudnn(qkv: jax.Array, heads: int, scale: float, rows: NamedSharding | None) -> jax.Array:
    """cuDNN's fused attention; the same call splits rows and heads over devices."""
    del rows
    return _dot_product(qkv, heads, scale, "cudnn")


def _dot_product(
    qkv: jax.Array, heads: int, scale: float, implementation: Literal["xla", "cudnn"]
) -> jax.Array:
    b, t, width = qkv.shape
    q, k, v = jnp.unstack(qkv.reshape(b, t, 3, heads, -1), axis=2)
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation)
    return y.reshape(b, t, width // 3)


def pallas(
    qkv: jax.Array, heads: int, scale: float, rows: NamedSharding | None, interpret: bool = False
) -> jax.Array:
    """`shortcut_jax.models.attention_kernel`, a Pallas kernel for TPUs, forward and backward.

    Args:
      qkv: [B, T, 3h], as `Kernel.attend`.
      heads: how many.
      scale: of the logits.
      rows: sharding of the rows; the compiler cannot split a kernel by itself.
      interpret: run the kernel as XLA's operations, for tests without a TPU.
    """
    # Importing Pallas takes half a second.
    from shortcut_jax.models import attention_kernel

    attend = functools.partial(
        attention_kernel.attend, heads=heads, scale=scale, interpret=interpret
    )
    if rows is not None:
        # Whether results differ over the mesh is not known of a kernel: nothing to check.
        attend = jax.shard_map(
            attend, mesh=rows.mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False
        )
    # The backward pass needs nothing else of the forward pass: kept, it is not run again.
    return checkpoint_name(attend(qkv), KEPT)


@dataclasses.dataclass(frozen=True)
class Use:
    """What attention is wanted for.

    Attributes:
      device: one of those it runs on.
      dtype: of q, k and v.
      tokens: T.
      heads: N.
      head_dim: units of a head.
      forward_mode: whether jax.jvp differentiates it.
    """

    device: Any
    dtype: Any
    tokens: int
    heads: int
    head_dim: int
    forward_mode: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention, and where it can be used.

    Attributes:
      attend: attend(qkv, heads, scale, rows), [B, T, 3h] -> [B, T, h]: of q, k and v one after
        the other, of each its heads, all of one's units side by side.
      platform: kind of device it is for; "" for all.
      not_on: the devices of that kind, by `device_kind`, that it is not for.
      forward_mode: whether jax.jvp can differentiate it.
      dtypes: names of the types of q, k and v; empty for all.
      tokens: what T must be a multiple of.
      head_dim: what D must be a multiple of.
      largest_head_dim: at most.
      memory: bytes of a device that it needs for a `Use`.
      largest_memory: at most.
    """

    attend: Callable[..., jax.Array]
    platform: str = ""
    not_on: tuple[str, ...] = ()
    forward_mode: bool = False
    dtypes: tuple[str, ...] = ()
    tokens: int = 1
    head_dim: int = 1
    largest_head_dim: float = math.inf
    memory: Callable[[Use], float] = lambda use: 0
    largest_memory: float = math.inf

    def refusal(self, use: Use) -> str:
        """Why it cannot be used; "" if it can."""
        here, kind = use.device.platform, use.device.device_kind
        dtype = jnp.dtype(use.dtype).name
        if self.platform not in ("", here):
            return f"is a kernel for a {self.platform}, and this runs on a {here}"
        if kind in self.not_on:
            return f"is no kernel for a {kind}"
        if self.dtypes and dtype not in self.dtypes:
            types = " or ".join(self.dtypes)
            return f"works in {types}, and the matrix products (model.dtype) are in {dtype}"
        if use.tokens % self.tokens:
            return (
                f"needs a multiple of {self.tokens} tokens, and there are {use.tokens} (image side "
                "over model.patch_size, squared)"
            )
        if use.head_dim % self.head_dim or use.head_dim > self.largest_head_dim:
            return (
                f"needs heads of a multiple of {self.head_dim} and at most "
                f"{self.largest_head_dim} units, and model.hidden_size / model.num_heads is "
                f"{use.head_dim}"
            )
        if self.memory(use) > self.largest_memory:
            return (
                f"holds a whole row at once, for which {use.tokens} tokens of model.hidden_size="
                f"{use.heads * use.head_dim} are too many"
            )
        if use.forward_mode and not self.forward_mode:
            return "has no forward-mode derivative, which this objective takes of the network"
        return ""


def _vmem(use: Use) -> float:
    # Of the backward pass: a row of qkv, of its gradient and of the result's, each twice, as one
    # is worked on while another is moved; and what there is of [T, T] at a time.
    row = 7 * use.tokens * use.heads * use.head_dim * jnp.dtype(use.dtype).itemsize
    return 2 * row + 4 * use.tokens**2 * 4


KERNELS = {
    "xla": Kernel(xla, forward_mode=True),
    # 128 holds for every GPU that cuDNN's kernel is for; from Hopper on it is 256.
    "cudnn": Kernel(cudnn, "gpu", dtypes=("bfloat16", "float16"), head_dim=8, largest_head_dim=128),
    # Mosaic, its compiler, has no products in bfloat16 for TPUs before v4, whose VMEM is the
    # smallest of those after.
    "pallas": Kernel(
        pallas, "tpu", not_on=("TPU v2", "TPU v3"), tokens=8,
        memory=_vmem, largest_memory=16 * 2**20,
    ),
}  # fmt: skip
AUTO = "auto"
PREFERRED = ("pallas",)  # of "auto", where one can be used; cuDNN's has not been timed


def check(name: str, use: Use) -> None:
    """Raises UserError if attention of that name cannot be used for that."""
    reason = "" if name == AUTO else KERNELS[name].refusal(use)
    if reason:
        raise UserError(
            f"model.attention={name} {reason}; expected a kernel that can be used here: set "
            f"model.attention={AUTO}."
        )


def choose(name: str, use: Use) -> str:
    """The kernel of that name or, of "auto", the preferred one; "xla" where it cannot be used."""
    names = PREFERRED if name == AUTO else (name,)
    return next((found for found in names if not KERNELS[found].refusal(use)), "xla")
