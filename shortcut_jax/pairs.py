"""Pairs of noise and sample that a teacher makes before a reflow student trains on them.

In WORKDIR/pairs: manifest.json, which says what the pairs are, and one .npy file per SHARD_ROWS
pairs with records (noise, image, label). Pair i is a function of the seed and i, made by the
evaluation sampler over the whole mesh, so a killed run continues at the shard it reached, on any
number of devices. Once a run has a checkpoint, which names its pairs, it needs them and no teacher.
"""

import io
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from shortcut_jax import manifest, run, sampling, state
from shortcut_jax.data.sources import Dataset, Rows
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import build
from shortcut_jax.parallel import distributed, sharding
from shortcut_jax.pretrained import Pretrained, digest

SHARD_ROWS = 4096
SCOPE = "pairs"  # of the random streams: these noises are never those of an evaluation
FIX = "Use that teacher and config, or another --workdir"


def missing(config: ConfigDict, workdir: str | os.PathLike[str]) -> list[int]:
    """The first pair of each shard that is not in a workdir; [] if a valid config needs none."""
    firsts = range(0, config.objective.get("num_pairs", 0), SHARD_ROWS)
    return [first for first in firsts if not _shard_path(Path(workdir) / "pairs", first).exists()]


def prepare(
    setup: run.Setup,
    teacher: Pretrained | None,
    workdir: str | os.PathLike[str],
) -> Dataset:
    """Opens the pairs of a run, making those that are missing.

    Args:
      setup: of a run whose objective learns from pairs: `num_pairs` of them, in `pair_steps` Euler
        steps, guided by `cfg_scale`.
      teacher: the velocity model that makes them; None if none is `missing`. Whose they are is then
        for `run.check_resume` to see, by the fingerprint.
      workdir: of the run.

    Returns:
      Rows {"noise", "image": float32 [n, H, W, C], "label": int32 [n]}, read from disk as needed.

    Raises:
      UserError: the folder holds other pairs, or a file in it is damaged or cannot be written.
    """
    folder = Path(workdir) / "pairs"
    if teacher is None:
        contents = manifest.read(folder, "pairs")
        manifest.refuse_differences(folder, contents, _asked_for(setup), "pairs", FIX)
    else:
        shapes = jax.eval_shape(
            lambda: state.init_params(setup.network, setup.image_shape, setup.config.seed)
        )
        params_sharding = sharding.shard_tree(shapes, setup.mesh)
        params = teacher.params(shapes, params_sharding)
        contents = {
            **_asked_for(setup),
            "teacher_digest": digest(params),
            "teacher_step": teacher.step,
            "matrix_products": str(np.dtype(setup.network.dtype)),
        }
        manifest.claim(folder, contents, "pairs", "*.npy", FIX)
        _make_missing(folder, setup, params, params_sharding)
    return _open(folder, setup, manifest.digest(contents))


def _asked_for(setup: run.Setup) -> dict[str, Any]:
    objective = setup.config.objective
    return {
        "steps": objective.pair_steps,
        "cfg_scale": objective.cfg_scale,
        "count": objective.num_pairs,
        "seed": setup.config.seed,
        "image_shape": list(setup.image_shape),
        "num_classes": setup.num_classes,
        "shard_rows": SHARD_ROWS,
    }


def _make_missing(folder: Path, setup: run.Setup, params: Any, params_sharding: Any) -> None:
    config, count = setup.config, setup.config.objective.num_pairs
    firsts = distributed.of_process_0(missing(config, folder.parent))
    if not firsts:
        return
    flow = build("flow_matching", setup.num_classes, cfg_scale=config.objective.cfg_scale)
    sample = sampling.make_sampler(
        flow, state.apply_fn(setup.network), params_sharding, setup.mesh,
        seed=config.seed, image_shape=setup.image_shape, num_classes=setup.num_classes,
        scope=SCOPE,
    )  # fmt: skip

    @jax.jit
    def initial_noise(indices):
        shape, classes = setup.image_shape, setup.num_classes
        return sampling.initial(config.seed, indices, shape, classes, SCOPE)[0]

    logging.info("Making %d pairs in %d steps each.", count, config.objective.pair_steps)
    for first in firsts:
        shard = np.empty(min(SHARD_ROWS, count - first), _record(setup))
        for begin in range(0, len(shard), config.eval.batch_size):
            # The last batch is sampled whole and cut: every program has one shape.
            indices = np.arange(begin, begin + config.eval.batch_size) + first
            images, labels = sample(params, indices, config.objective.pair_steps)
            noise = initial_noise(indices.astype(np.uint32))
            part = shard[begin : begin + len(indices)]
            for name, a in (("noise", noise), ("image", images), ("label", labels)):
                part[name] = sharding.to_host(a)[: len(part)]
        if jax.process_index() == 0:
            content = io.BytesIO()
            np.save(content, shard)
            manifest.write(_shard_path(folder, first), content.getvalue())
        logging.info("%d of %d pairs.", first + len(shard), count)
    # Process 0 may still be writing the last shard, which the others are about to open.
    multihost_utils.sync_global_devices("pairs")


def _record(setup: run.Setup) -> np.dtype:
    shape = setup.image_shape
    return np.dtype(
        [("noise", np.float32, shape), ("image", np.float32, shape), ("label", np.int32)]
    )


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"{first // SHARD_ROWS:05d}.npy"


def _open(folder: Path, setup: run.Setup, fingerprint: str) -> Dataset:
    count = setup.config.objective.num_pairs
    shards = [
        _open_shard(_shard_path(folder, first), min(SHARD_ROWS, count - first), _record(setup))
        for first in range(0, count, SHARD_ROWS)
    ]

    def read(indices: np.ndarray) -> Rows:
        rows = np.stack([shards[i // SHARD_ROWS][i % SHARD_ROWS] for i in indices])
        return {name: np.ascontiguousarray(rows[name]) for name in ("noise", "image", "label")}

    return Dataset(
        name=f"{setup.config.data.name} pairs",
        split="train",
        image_shape=setup.image_shape,
        num_classes=setup.num_classes,
        size=count,
        fingerprint=fingerprint,
        read=read,
        holds="samples",
    )


def _open_shard(path: Path, size: int, record: np.dtype) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(shard, np.ndarray):
            raise ValueError("it holds several arrays")
        if shard.shape != (size,) or shard.dtype != record:
            raise ValueError(f"it holds {shard.shape} of {shard.dtype}")
        return shard
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as pairs ({error}); expected {size} of them: remove that file "
            "and start again, which makes it anew."
        ) from error
