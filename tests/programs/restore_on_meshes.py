"""Saves on one mesh and reads on others, whole and in part: for tests/test_checkpoint.py.

python -m tests.programs.restore_on_meshes WORKDIR, with 8 devices.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import checkpoint
from shortcut_jax.parallel import sharding


def make_state():
    arrays = {"kernel": jnp.arange(256.0).reshape(16, 16), "bias": jnp.arange(6.0)}
    return {"params": arrays, "ema": jax.tree.map(lambda a: a + 0.5, arrays)}


def place(mesh):
    return sharding.shard_tree(jax.eval_shape(make_state), mesh)


def main(workdir: str) -> None:
    expected = make_state()
    state = jax.device_put(expected, place(sharding.make_mesh(1, 8)))
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    checkpoints.save(1, state, {"config": {}, "data": {}, "clock": {}})
    checkpoints.wait()

    for data, fsdp in ((8, 1), (2, 4), (1, 8), (1, 1)):
        shardings = place(sharding.make_mesh(data, fsdp))
        shapes = checkpoint.with_shardings(jax.eval_shape(make_state), shardings)
        for names in (["params", "ema"], ["ema"]):
            found = checkpoints.restore(1, {name: shapes[name] for name in names})
            assert sorted(found) == sorted(names)
            for name in names:
                jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])
                placed = jax.tree.map(lambda a: a.sharding, found[name])
                assert placed == shardings[name], (data, fsdp)


if __name__ == "__main__":
    main(sys.argv[1])
