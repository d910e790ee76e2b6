"""Checkpoints of the paper's authors (github.com/kvfrans/shortcut-models, commit 6010043).

They are pickles of {"train_state": {"params", "params_ema", "opt_state", "step"}, "_timestamp"}.
The names are those that Flax gives to layers without one. What their network does otherwise than
ours by default is in `config.AUTHORS_CODE`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.errors import UserError
from shortcut_jax.weights import restricted_pickle
from shortcut_jax.weights.tables import Sizes, Source, flatten, layer

EXPECTED = "a checkpoint that kvfrans/shortcut-models wrote"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in our names.

    Attributes:
      step: number of updates, as it says.
      params: online parameters, a tree of float32 numpy arrays as `DiT` has them.
      ema: like params.
      sizes: of the network.
    """

    step: int
    params: dict[str, Any]
    ema: dict[str, Any]
    sizes: Sizes


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint. No code in it is run.

    Args:
      path: the file; or the folder that their code leaves where it should have written a local
        file, which has the file in it.

    Raises:
      UserError: it cannot be read, or is no such checkpoint.
    """
    path = _mislaid(path)
    try:
        with path.open("rb") as file:
            tree = restricted_pickle.load(file, str(path), EXPECTED)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected {EXPECTED}: mend the path."
        ) from error
    state = tree.get("train_state") if isinstance(tree, dict) else None
    names = ("params", "params_ema")
    if not isinstance(state, dict) or not all(isinstance(state.get(n), dict) for n in names):
        keys = sorted(map(str, tree)) if isinstance(tree, dict) else [type(tree).__name__]
        raise UserError(
            f"{path} holds no train state with params and params_ema (but "
            f"{', '.join(keys)[:100]}); expected {EXPECTED}: give such a file."
        )
    online, ema = (
        _without_process_axis(Source(flatten(state[name]), f"{path} ({name})", "/"))
        for name in names
    )
    sizes = infer_sizes(online)
    return Checkpoint(_step(state, path), to_params(online, sizes), to_params(ema, sizes), sizes)


def infer_sizes(source: Source) -> Sizes:
    """The sizes of the network whose parameters these are (UserError if they are none)."""
    patch, _, channels, hidden = source.shape("PatchEmbed_0/Conv_0/kernel", 4)
    return Sizes(
        patch_size=patch,
        hidden_size=hidden,
        depth=source.count("DiTBlock_"),
        mlp_ratio=source.shape("DiTBlock_0/MlpBlock_0/Dense_0/kernel", 2)[1] / hidden,
        channels=channels,
        num_classes=source.shape("LabelEmbedder_0/Embed_0/embedding", 2)[0] - 1,
    )


def to_params(source: Source, sizes: Sizes) -> dict[str, Any]:
    """Their parameters under our names and in our layouts.

    Raises:
      UserError: an entry is missing, too many, or of another shape.
    """
    h, p, c = sizes.hidden_size, sizes.patch_size, sizes.channels
    mlp = int(h * sizes.mlp_ratio)

    def dense(name, n_in, n_out):
        return layer(source.take(f"{name}/kernel", n_in, n_out), source.take(f"{name}/bias", n_out))

    def embedder(name):
        return {"in": dense(f"{name}/Dense_0", 256, h), "out": dense(f"{name}/Dense_1", h, h)}

    def block(name):
        k, q, v = (dense(f"{name}/Dense_{i}", h, h) for i in (1, 2, 3))
        return {
            "modulation": dense(f"{name}/Dense_0", h, 6 * h),
            "qkv": {
                part: np.concatenate([q[part], k[part], v[part]], axis=-1)
                for part in ("kernel", "bias")
            },
            "attention_out": dense(f"{name}/Dense_4", h, h),
            "mlp_in": dense(f"{name}/MlpBlock_0/Dense_0", h, mlp),
            "mlp_out": dense(f"{name}/MlpBlock_0/Dense_1", mlp, h),
        }

    params = {
        "patch_embed": layer(
            # A convolution whose stride is its size is a product with patches in this order.
            source.take("PatchEmbed_0/Conv_0/kernel", p, p, c, h).reshape(p * p * c, h),
            source.take("PatchEmbed_0/Conv_0/bias", h),
        ),
        "t_embed": embedder("TimestepEmbedder_0"),
        "d_embed": embedder("TimestepEmbedder_1"),
        "label_embed": {
            "embedding": source.take("LabelEmbedder_0/Embed_0/embedding", sizes.num_classes + 1, h)
        },
        **{f"block_{i}": block(f"DiTBlock_{i}") for i in range(sizes.depth)},
        "modulation": dense("FinalLayer_0/Dense_0", h, 2 * h),
        "output": dense("FinalLayer_0/Dense_1", h, p * p * c),
    }
    source.take("Embed_0/embedding", 256, 1)  # log-variances that nothing reads
    source.finish()
    return params


def _mislaid(path: Path) -> Path:
    """Their code makes a folder of the checkpoint's name and moves NAME.tmp into it."""
    inside = path / f"{path.name}.tmp"
    return inside if path.is_dir() and inside.is_file() else path


def _without_process_axis(source: Source) -> Source:
    """Gathering over one process leaves an axis of size 1 in front of every array (newer JAX)."""
    arrays = [a for a in source.arrays.values() if isinstance(a, np.ndarray)]
    kernel = source.arrays.get("PatchEmbed_0/Conv_0/kernel")
    gathered = isinstance(kernel, np.ndarray) and kernel.ndim == 5
    if not gathered or any(a.shape[:1] != (1,) for a in arrays):
        return source
    squeezed = {k: a[0] if isinstance(a, np.ndarray) else a for k, a in source.arrays.items()}
    return Source(squeezed, source.name, source.separator)


def _step(state: Mapping[str, Any], path: Path) -> int:
    step = np.asarray(state.get("step"))
    if step.size != 1 or step.dtype.kind not in "iu" or int(step.item()) < 0:
        raise UserError(
            f"{path} says step={state.get('step')!r:.40}, which is no number of updates; expected "
            f"{EXPECTED}: give such a file."
        )
    return int(step.item())
