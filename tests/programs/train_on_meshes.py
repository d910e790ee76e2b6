"""Trains on several meshes of one process's devices: for tests/test_meshes.py.

python -m tests.programs.train_on_meshes OUT DATA,FSDP ... writes per mesh OUT/DATAxFSDP/, the
workdir, OUT/DATAxFSDP.npz, the final parameters and EMA, and OUT/DATAxFSDP.json, how the bytes of
every array of the train state are shared by the devices.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import sharding, train


def small_config(data: int, fsdp: int) -> ConfigDict:
    config = digits.get_config("small")
    config.total_steps = 3
    config.optimizer.update(lr=1e-3, schedule="constant", warmup_steps=0)
    config.mesh.update(data=data, fsdp=fsdp)
    config.log.update(every=1, tensorboard=False)
    config.eval.every = 0
    return config


def named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in leaves}


def main(out: Path, meshes: list[str]) -> None:
    for mesh in meshes:
        data, fsdp = map(int, mesh.split(","))
        state = train.train(small_config(data, fsdp), out / f"{data}x{fsdp}")
        arrays = named_leaves({"params": state.params, "ema": state.ema})
        np.savez(out / f"{data}x{fsdp}.npz", **{k: sharding.to_host(a) for k, a in arrays.items()})
        shares = {
            name: {
                "shape": a.shape,
                "bytes": a.nbytes,
                "shards": [shard.data.nbytes for shard in a.addressable_shards],
            }
            for name, a in named_leaves(state).items()
        }
        (out / f"{data}x{fsdp}.json").write_text(json.dumps(shares))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
