"""The training step as the compiler left it: for tests/parallel/test_meshes.py.

python -m tests.programs.compiled_steps OUT NAME=ARGUMENT[;KEY=VALUE...] ... writes OUT/NAME.txt,
the compiled program of configs/digits.py:ARGUMENT, and OUT/NAME.json, its FLOPs on a device, by the
compiler and by the formula, and number of parameters. It also writes OUT/head_of_batch.txt, a
layout to avoid.
"""

import ast
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import run, state, train
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import flops

# DiT-S in small: 6 heads, an MLP of 4 times the width, as many modulations; tokens of 8x8 images.
TINY_S = {"hidden_size": 96, "depth": 1, "num_heads": 6, "patch_size": 2, "mlp_ratio": 4.0}


class _Compiled(Exception):
    """Ends a run when its step is compiled."""


def compiled_step(config: ConfigDict, workdir: Path) -> jax.stages.Compiled:
    """The program that `train.train` would run, with its shardings and donated state."""

    def stop(config, compiled, seconds):
        raise _Compiled(compiled)

    try:
        with mock.patch.object(run, "report_compiled", stop):
            train.train(config, workdir)
    except _Compiled as stopped:
        return stopped.args[0]
    raise AssertionError("train.train no longer reports the compiled step")


def count_parameters(config: ConfigDict) -> int:
    setup = run.prepare(config)
    return state.count(
        jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, config.seed))
    )


def tiny_config(argument: str, overrides: dict) -> ConfigDict:
    config = digits.get_config(argument)
    config.model.update(TINY_S)
    config.batch_size = 64
    config.objective.class_dropout = 0.1  # which guidance needs
    config.update_from_flattened_dict(overrides)
    return config


def head_of_batch() -> str:
    """Taking the first rows of a batch whose rows are spread over the devices."""
    rows = sharding.batch_sharding(sharding.make_mesh(jax.device_count(), 1))
    pick = jax.jit(lambda x: 2 * x[:8], in_shardings=rows, out_shardings=rows)
    return pick.lower(jnp.zeros((64, 8, 8, 1))).compile().as_text()


def main(out: Path, specs: list[str]) -> None:
    (out / "head_of_batch.txt").write_text(head_of_batch())
    for spec in specs:
        name, _, rest = spec.partition("=")
        argument, *overrides = rest.split(";")
        pairs = (item.split("=") for item in overrides)
        config = tiny_config(argument, {key: ast.literal_eval(value) for key, value in pairs})
        compiled = compiled_step(config, out / name)
        (out / f"{name}.txt").write_text(compiled.as_text())
        found = {
            "flops": compiled.cost_analysis()["flops"],
            "flops_by_formula": flops.train_step(config, (8, 8, 1)) / jax.device_count(),
            "parameters": count_parameters(config),
        }
        (out / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
