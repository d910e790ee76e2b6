"""Trains on several meshes of one process's devices: for tests/parallel/test_meshes.py.

python -m tests.programs.train_on_meshes OUT NAME=DATA,FSDP[;KEY=VALUE...] ... writes for each
OUT/NAME/, the workdir, OUT/NAME.npz, the final parameters and EMA in the unrolled layout, and
OUT/NAME.json, how the bytes of every array of the train state are shared by the devices.
"""

import ast
import json
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import layers, train
from shortcut_jax.parallel import sharding


def small_config(data: int, fsdp: int, overrides: dict) -> ConfigDict:
    config = digits.get_config("small")
    config.total_steps = 3
    config.optimizer.update(lr=1e-3, schedule="constant", warmup_steps=0)
    config.mesh.update(data=data, fsdp=fsdp)
    config.log.update(every=1, tensorboard=False)
    config.averages.update(rates=(0.5,), power=(0.1,))
    config.eval.every = 0
    config.update_from_flattened_dict(overrides)
    return config


def named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in leaves}


def main(out: Path, specs: list[str]) -> None:
    for spec in specs:
        name, _, rest = spec.partition("=")
        mesh, *overrides = rest.split(";")
        data, fsdp = map(int, mesh.split(","))
        pairs = (item.split("=") for item in overrides)
        config = small_config(data, fsdp, {key: ast.literal_eval(v) for key, v in pairs})
        state = train.train(config, out / name)
        parts = {"params": state.params, "ema": state.ema, "averages": state.averages}
        arrays = named_leaves(layers.unstack(parts))
        np.savez(out / f"{name}.npz", **{k: sharding.to_host(a) for k, a in arrays.items()})
        shares = {
            name: {
                "shape": a.shape,
                "bytes": a.nbytes,
                "shards": [shard.data.nbytes for shard in a.addressable_shards],
            }
            for name, a in named_leaves(state).items()
        }
        (out / f"{name}.json").write_text(json.dumps(shares))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
