"""Weights of the diffusion transformers of facebookresearch/DiT, without PyTorch.

Their network is asked at noise level s = 0 (almost data) ... 999 (noise) and predicts the noise,
and a variance that is dropped here. Ours is asked at t, and `objectives.diffusion` asks for level s
at t = 1 - (s + 1) / 1000, which enters the sinusoids as 1000 t = 999 - s. Because cos and sin of
f (999 - a) are a rotation of those of f a, the first layer of the time embedding absorbs the
difference, and the converted network gives what theirs gives.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.errors import UserError
from shortcut_jax.models import dit
from shortcut_jax.weights import torch_file
from shortcut_jax.weights.tables import Sizes, Source, layer

LAST_LEVEL = 999
FREQUENCIES = 128


def read(path: Path) -> tuple[dict[str, Any], Sizes]:
    """Reads weights, as torch.save or safetensors write them. No code in the file is run.

    Returns:
      Parameters as `DiT` has them under the default switches, float32 numpy arrays; what embeds the
      step size answers zero. And the sizes of the network.

    Raises:
      UserError: it cannot be read, or is no such network.
    """
    arrays = torch_file.read(path)
    source = Source(arrays, str(path), ".")
    sizes = infer_sizes(source)
    return to_params(source, sizes), sizes


def infer_sizes(source: Source) -> Sizes:
    """The sizes of the network whose weights these are (UserError if they are none)."""
    hidden, channels, patch, _ = source.shape("x_embedder.proj.weight", 4)
    return Sizes(
        patch_size=patch,
        hidden_size=hidden,
        depth=source.count("blocks."),
        mlp_ratio=source.shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        channels=channels,
        num_classes=source.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
    )


def to_params(source: Source, sizes: Sizes) -> dict[str, Any]:
    """Their weights under our names and in our layouts.

    Raises:
      UserError: an entry is missing, too many, or of another shape.
    """
    h, p, c = sizes.hidden_size, sizes.patch_size, sizes.channels
    mlp = int(h * sizes.mlp_ratio)

    def dense(name, n_in, n_out):
        weight = source.take(f"{name}.weight", n_out, n_in)
        return layer(np.ascontiguousarray(weight.T), source.take(f"{name}.bias", n_out))

    def block(name):
        return {
            "modulation": dense(f"{name}.adaLN_modulation.1", h, 6 * h),
            "qkv": dense(f"{name}.attn.qkv", h, 3 * h),
            "attention_out": dense(f"{name}.attn.proj", h, h),
            "mlp_in": dense(f"{name}.mlp.fc1", h, mlp),
            "mlp_out": dense(f"{name}.mlp.fc2", mlp, h),
        }

    patches = source.take("x_embedder.proj.weight", h, c, p, p).transpose(2, 3, 1, 0)
    t_embed = {"in": dense("t_embedder.mlp.0", 256, h), "out": dense("t_embedder.mlp.2", h, h)}
    t_embed["in"]["kernel"] = _reverse_time(t_embed["in"]["kernel"])
    params = {
        "patch_embed": layer(
            np.ascontiguousarray(patches).reshape(p * p * c, h),
            source.take("x_embedder.proj.bias", h),
        ),
        "t_embed": t_embed,
        "d_embed": _silent_embedder(h),
        "label_embed": {
            "embedding": source.take("y_embedder.embedding_table.weight", sizes.num_classes + 1, h)
        },
        **{f"block_{i}": block(f"blocks.{i}") for i in range(sizes.depth)},
        "modulation": dense("final_layer.adaLN_modulation.1", h, 2 * h),
        "output": _without_variance(source, sizes),
    }
    _check_positions(source, h)
    source.finish()
    return params


def _reverse_time(kernel: np.ndarray) -> np.ndarray:
    """The kernel [256, h] that makes of sinusoids of a what `kernel` makes of those of 999 - a."""
    f = np.exp(-math.log(10_000) * np.arange(FREQUENCIES) / FREQUENCIES)[:, None]
    cos, sin = np.cos(LAST_LEVEL * f), np.sin(LAST_LEVEL * f)
    of_cos, of_sin = np.split(kernel.astype(np.float64), 2)
    return np.concatenate([cos * of_cos + sin * of_sin, sin * of_cos - cos * of_sin]).astype(
        np.float32
    )


def _silent_embedder(h: int) -> dict[str, Any]:
    """An embedder that answers zero, and learns: its first layer is as a fresh one's."""
    kernel = np.random.default_rng(0).normal(scale=0.02, size=(2 * FREQUENCIES, h))
    zeros = np.zeros(h, np.float32)
    return {
        "in": layer(kernel.astype(np.float32), zeros),
        "out": layer(np.zeros((h, h), np.float32), zeros),
    }


def _without_variance(source: Source, sizes: Sizes) -> dict[str, np.ndarray]:
    h, p, c = sizes.hidden_size, sizes.patch_size, sizes.channels
    out = source.shape("final_layer.linear.weight", 2)[0]
    both = 2 * c if out == 2 * p * p * c else c  # noise and variance, or noise alone
    kernel = source.take("final_layer.linear.weight", p * p * both, h)
    bias = source.take("final_layer.linear.bias", p * p * both)
    kernel = kernel.reshape(p * p, both, h)[:, :c].reshape(p * p * c, h)
    return layer(
        np.ascontiguousarray(kernel.T), bias.reshape(p * p, both)[:, :c].reshape(p * p * c)
    )


def _check_positions(source: Source, h: int) -> None:
    tokens = source.shape("pos_embed", 3)[1]
    grid = math.isqrt(tokens)
    positions = source.take("pos_embed", 1, grid * grid, h)
    if h % 4 or np.abs(positions - dit.sincos_position_embedding(h, grid)).max() > 1e-4:
        raise UserError(
            f"{source.name} has a position embedding of its own; expected DiT's fixed one, which "
            "this network computes: give weights that were trained with it."
        )
