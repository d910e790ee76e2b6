"""FLOPs of the network and of a training step, from its shape alone: the least they can be.

Matrix products alone are counted, 2 FLOPs for a multiply-add. For T tokens of width h, a block does
24 T h^2 in its products with weights (6 for q, k and v, 2 for the output, 16 for an MLP of ratio
4), 4 T^2 h in attention, and 12 h^2 per row in its modulation. A backward pass does twice the work
of the forward pass.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from shortcut_jax.comparison import budget
from shortcut_jax.errors import UserError

FREQUENCIES = 256  # sinusoids that the embeddings of t and d begin with (models.dit.SinusoidMLP)


def forward(model: ConfigDict, image_shape: Sequence[int]) -> int:
    """FLOPs of the network for one row.

    Args:
      model: section `model` of a config.
      image_shape: (H, W, C) of what the network sees.
    """
    h, p = model.hidden_size, model.patch_size
    height, width, channels = image_shape
    tokens, patch = height * width // p**2, p * p * channels
    block = 2 * tokens * h * (4 * h + 2 * int(h * model.mlp_ratio))
    block += 4 * tokens**2 * h  # q k^T and its product with v
    block += 2 * h * 6 * h  # the modulation, one for all tokens
    ends = 2 * 2 * tokens * patch * h  # patch embedding and output
    conditioning = 2 * 2 * (FREQUENCIES * h + h * h) + 2 * h * 2 * h  # t, d; the last modulation
    return model.depth * block + ends + conditioning


def attention_share(model: ConfigDict, image_shape: Sequence[int]) -> float:
    """The part of `forward` that the products of attention without weights are."""
    tokens = math.prod(image_shape[:2]) // model.patch_size**2
    return model.depth * 4 * tokens**2 * model.hidden_size / forward(model, image_shape)


def train_step(config: ConfigDict, image_shape: Sequence[int]) -> float:
    """FLOPs of a training step over all devices, nothing computed twice.

    3 forward passes for every row, and 1 for every row that the targets ask a network for. What
    encodes images on the way is not among them.

    Args:
      config: of the run.
      image_shape: (H, W, C) of what the network sees.
    """
    return budget.per_update(config) * forward(config.model, image_shape)


def counted(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of a program as XLA counts them before it optimises.

    For a CPU, whatever else there is: for GPUs and TPUs jax does not count what is not compiled.

    Args:
      function: to be counted.
      shapes: of its arguments, trees of jax.ShapeDtypeStruct.

    Raises:
      UserError: jax has no CPU.
    """
    import jax  # heavy

    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX_PLATFORMS={platforms} leaves out the CPU, for which FLOPs are counted; expected "
            f"it beside the others: set JAX_PLATFORMS={platforms},cpu, or unset the variable."
        ) from error
    with jax.default_device(cpu):
        cost: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return cost["flops"]
