"""Two small networks with fixed parameters, to be exported and run elsewhere.

python -m tests.golden.export_cases FOLDER      writes FOLDER/paper, FOLDER/authors_code and
                                                FOLDER/inputs.npz
"""

import sys
from pathlib import Path

import jax
import numpy as np

from configs import digits
from shortcut_jax import checkpoint, run, state
from shortcut_jax.weights import exported
from shortcut_jax.weights.tables import flatten, unflatten
from tests.golden import philox

ROOT = Path(__file__).parent
SIZES = {"model.hidden_size": 32, "model.num_heads": 2, "model.depth": 2}
CASES = {
    "paper": ("", {"objective.cfg_scale": 1.5, "objective.class_dropout": 0.1}),
    "authors_code": ("authors_code", {"objective.cfg_scale": 0.0, "model.patch_size": 4}),
}
STEPS = (1, 4, 128)


def setup_of(name: str) -> run.Setup:
    arg, overrides = CASES[name]
    config = digits.get_config(arg)
    config.update_from_flattened_dict({**SIZES, **overrides})
    return run.prepare(config)


def params_of(setup: run.Setup, name: str):
    shapes = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    flat = {k: philox.parameter(f"{name}/{k}", a.shape) for k, a in flatten(shapes).items()}
    return unflatten(flat)


def inputs(name: str) -> dict[str, np.ndarray]:
    """x, t, d, labels, [8, ...] each: every size of a step, and the null label."""
    return {
        "x": philox.values(f"{name}/x", (8, 8, 8, 1), 1.7),
        "t": np.float32([0, 1 / 128, 0.3, 0.5, 0.77, 127 / 128, 0.25, 0]),
        "d": np.float32([0, 1 / 128, 1 / 64, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1]),
        "labels": np.int64([0, 1, 2, 3, 4, 5, 9, 10]),
    }


def save_run(workdir: Path, name: str) -> None:
    """A run with these parameters as its EMA, and zeros as the online ones."""
    setup = setup_of(name)
    params = params_of(setup, name)
    run.claim_workdir(setup.config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    saved = {"params": jax.tree.map(np.zeros_like, params), "ema": params}
    checkpoints.save(7, saved, {"config": {}, "data": {}, "clock": {}})
    checkpoints.close()


if __name__ == "__main__":
    for case in CASES:
        made = setup_of(case)
        folder = Path(sys.argv[1]) / case
        folder.mkdir(parents=True)
        described = exported.describe(made, 7, "ema")
        for file, content in exported.files(params_of(made, case), described).items():
            (folder / file).write_bytes(content)
    given = {f"{case}/{key}": a for case in CASES for key, a in inputs(case).items()}
    np.savez(Path(sys.argv[1]) / "inputs.npz", steps=STEPS, **given)
