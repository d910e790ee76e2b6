"""Runs that nobody trained: a config and checkpoints of random parameters, made in no time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import checkpoint, run, state


def small(objective: str, **overrides: Any) -> ConfigDict:
    """The small digits config of an objective, with flat overrides."""
    config = digits.get_config(f"small,objective={objective}")
    config.update_from_flattened_dict(overrides)
    return config


def param_shapes(setup: run.Setup) -> Any:
    return jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))


def random_params(setup: run.Setup, seed: int) -> Any:
    """Random everywhere: layers that start at zero would hide what is before them."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: numbers.normal(scale=0.2, size=a.shape).astype(np.float32), param_shapes(setup)
    )


def save_run(workdir: Path, config: ConfigDict, steps: tuple[int, ...] = (4,)) -> dict[int, Any]:
    """Writes config.json and a checkpoint per step; returns the EMA of each."""
    setup = run.prepare(config)
    run.claim_workdir(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep=len(steps))
    emas = {}
    for step in steps:
        emas[step] = random_params(setup, seed=step)
        saved = {"params": random_params(setup, seed=1000 + step), "ema": emas[step]}
        checkpoints.save(step, saved, {"config": {}, "data": {}, "clock": {}})
    checkpoints.close()
    return emas
