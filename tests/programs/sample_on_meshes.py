"""Samples with several meshes and batch sizes: for tests/evaluation/test_measuring.py.

python -m tests.programs.sample_on_meshes OUT DATA,FSDP,BATCH_SIZE ... writes OUT/SPEC.npz for each:
  noise    float32 [n, H, W, C], where sampling starts from
  labels   int32 [n]
  images   uint8 [n, H, W, C], in 4 steps of a network that is not trained but does something
  decoded  float32 [80, 16, 16, 3], by an autoencoder of random weights
and OUT/SPEC.json, the records of the evaluation.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from shortcut_jax import data, run, sampling, spaces, state
from shortcut_jax.evaluation import grid, measuring
from shortcut_jax.parallel import sharding
from tests.kept_samples import by_steps

NUM_SAMPLES = 50  # a multiple of no batch size
NUM_STEPS = 4


def make_params(setup: run.Setup):
    """Random everywhere: the layers that start at zero would make every velocity zero."""
    params = state.init_params(setup.network, setup.image_shape, 0)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda a, k: a + 0.1 * jax.random.normal(k, a.shape), params, keys)


def initial_noise(setup: run.Setup, shardings, batch_size: int) -> np.ndarray:
    """Samples of a network whose velocity is zero: the noise, as float32."""
    sample = sampling.make_sampler(
        setup.objective, lambda params, x, t, d, labels: jnp.zeros_like(x), shardings, setup.mesh,
        seed=0, image_shape=setup.image_shape, num_classes=setup.num_classes,
    )  # fmt: skip
    params = jax.device_put(make_params(setup), shardings)
    starts = range(0, NUM_SAMPLES, batch_size)
    batches = [sample(params, np.arange(i, i + batch_size), NUM_STEPS)[0] for i in starts]
    return np.concatenate([sharding.to_host(batch) for batch in batches])[:NUM_SAMPLES]


def decoded(mesh: jax.sharding.Mesh) -> np.ndarray:
    """Images of 80 latents; more than the autoencoder takes at a time, on 8 devices too."""
    space = spaces.Latents("tiny", "random", scale=1.0, mesh=mesh)
    return sharding.to_host(space.decode(jax.random.normal(jax.random.key(2), (80, 2, 2, 4))))


def main(out: Path, specs: list[str]) -> None:
    config = digits.get_config("small")
    config.eval.update(num_samples=NUM_SAMPLES, metrics=("fd_digits_mlp64",))
    config.mesh.update(data=-1, fsdp=1)
    prepared = run.prepare(config)
    dataset = data.open_dataset(config.data)
    params = make_params(prepared)
    for spec in specs:
        data_axis, fsdp_axis, config.eval.batch_size = map(int, spec.split(","))
        mesh = sharding.make_mesh(data_axis, fsdp_axis)  # may leave devices out
        setup = run.build(config, mesh)
        shardings = sharding.shard_tree(params, mesh)
        evaluator = measuring.Evaluator(setup, dataset, shardings)
        placed = jax.device_put(params, shardings)
        kept, sink = by_steps()
        cells = grid.cells(setup, grid.Grid(steps=(NUM_STEPS,)))
        found = evaluator.run(placed, 0, cells, sink=sink)
        noise = initial_noise(setup, shardings, config.eval.batch_size)
        samples = kept[NUM_STEPS]
        arrays = {"noise": noise, "labels": samples.labels, "images": samples.images}
        np.savez(out / f"{spec}.npz", decoded=decoded(mesh), **arrays)
        (out / f"{spec}.json").write_text(json.dumps(found.records))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
