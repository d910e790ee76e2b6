"""Makes authors_*.npz and authors_checkpoint.pkl.gz with the code of the paper's authors.

The code is kvfrans/shortcut-models at commit 6010043 (model.py, utils/checkpoint.py and
utils/train_state.py, unchanged), in the versions that its requirements.txt names:

  python3.11 -m venv old
  old/bin/pip install jax==0.4.20 jaxlib==0.4.20 flax==0.7.4 optax==0.1.7 chex==0.1.82 "numpy<2" \
      scipy==1.12.0 einops
  PYTHONPATH=CHECKOUT_OF_THEIR_REPOSITORY old/bin/python tests/golden/make_authors.py

authors_outputs.npz      outputs of two small networks shaped like DiT-B/2 (64 channels per head)
                         and DiT-XL/2 (72): every step token, five times, labels and the null label
authors_checkpoint.pkl.gz  what their `Checkpoint` writes of a train state for 8x8x1 images
authors_samples.npz      what their Euler loop makes with its online and its EMA parameters
"""

import gzip
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import philox
from flax.traverse_util import flatten_dict, unflatten_dict
from model import DiT
from utils.checkpoint import Checkpoint
from utils.train_state import TrainStateEma

HERE = Path(__file__).parent
NETWORKS = {
    "B": {"hidden_size": 128, "num_heads": 2, "depth": 2, "num_classes": 10},
    "XL": {"hidden_size": 144, "num_heads": 2, "depth": 3, "num_classes": 1},
}
DIGITS = {"hidden_size": 16, "num_heads": 2, "depth": 1, "num_classes": 10}
STEPS = (1, 4, 128)


def network(out_channels, **sizes):
    return DiT(
        patch_size=2, mlp_ratio=4, out_channels=out_channels, class_dropout_prob=0.1,
        dtype=jnp.float32, **sizes,
    )  # fmt: skip


def shapes_of(model, image_shape):
    one = jnp.zeros(1)
    key = {"params": jax.random.PRNGKey(0)}
    tree = jax.eval_shape(model.init, key, jnp.zeros((1, *image_shape)), one, one, one.astype(int))
    return {name: a.shape for name, a in flatten_dict(tree["params"], sep="/").items()}


def params_of(shapes, name, bits=24):
    flat = {key: philox.parameter(f"{name}/{key}", shape, bits) for key, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def outputs():
    found = {}
    for name, sizes in NETWORKS.items():
        model = network(4, **sizes)
        shapes = shapes_of(model, (8, 8, 4))
        token, time = np.divmod(np.arange(40), 5)
        x = philox.values(f"{name}/x", (40, 8, 8, 4), 2.0)
        t = np.float32([0, 1 / 128, 0.25, 0.5, 127 / 128])[time]
        labels = np.arange(40, dtype=np.int32) % (sizes["num_classes"] + 1)
        apply = jax.jit(lambda p, *args, model=model: model.apply({"params": p}, *args))
        found[f"{name}/output"] = apply(params_of(shapes, name), x, t, token, labels)
        found |= {f"{name}/t": t, f"{name}/token": token, f"{name}/labels": labels}
        found[f"{name}/sizes"] = json.dumps({**sizes, "shapes": shapes})
    np.savez_compressed(HERE / "authors_outputs.npz", **found)


def checkpoint():
    model = network(1, **DIGITS)
    shapes = shapes_of(model, (8, 8, 1))
    tx = optax.chain(optax.adamw(learning_rate=lambda _: 1e-4, weight_decay=0.1))
    train_state = TrainStateEma.create(
        model, params_of(shapes, "online", bits=8), jax.random.PRNGKey(10), tx=tx
    )
    train_state = train_state.replace(params_ema=params_of(shapes, "ema", bits=8), step=400_000)
    gathered = jax.experimental.multihost_utils.process_allgather(train_state)
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpoint(f"{folder}/celeba{gathered.step + 1}", parallel=False)
        saved.train_state = gathered
        saved.save()
        # Their code means to write a file of that name, and makes a folder first.
        content = Path(folder, "celeba400001", "celeba400001.tmp").read_bytes()
    (HERE / "authors_checkpoint.pkl.gz").write_bytes(gzip.compress(content, mtime=0))
    return train_state


def samples(train_state):
    noise = philox.values("noise", (6, 8, 8, 1), 1.7)
    labels = np.int32([0, 3, 5, 9, 10, 10])  # 10: no label
    found = {"noise": noise, "labels": labels}
    for name, call in (("online", train_state.call_model), ("ema", train_state.call_model_ema)):
        call = jax.jit(call)
        for num_steps in STEPS:
            x = noise
            dt_base = np.full(6, np.log2(num_steps).astype(np.int32))
            for i in range(num_steps):
                v = call(x, np.full(6, i / num_steps, np.float32), dt_base, labels)
                x = x + v * (1 / num_steps)
            found[f"{name}/{num_steps}"] = np.asarray(x)
    np.savez_compressed(HERE / "authors_samples.npz", **found)


if __name__ == "__main__":
    import jax.experimental.multihost_utils

    outputs()
    samples(checkpoint())
