"""Fashion-MNIST: 60,000 real 28x28 images padded to 32x32, for one GPU.

Not run to the end during development, for want of a GPU: there is no figure to expect yet. The
variant `cpu` has a table of all methods (docs/results.md), after a training too short to tell them
apart as the paper does. The variant `small` is what the tests train.

Data: `apt-get install dataset-fashion-mnist` (Debian), or the four idx files of the set in a folder
named by --config.data.idx_dir, or TFDS's own `fashion_mnist` prepared as array_record.

  python -m shortcut_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
  python -m shortcut_jax.eval --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
"""

from ml_collections import ConfigDict

from shortcut_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    """See `shortcut_jax.config.build` for what `arg` may say."""
    return config_lib.build(arg, base, {"small": small, "cpu": cpu}, BY_OBJECTIVE)


BY_OBJECTIVE = {"live_reflow": {"reflow_steps": 8}}  # see configs/digits.py


def base(c: ConfigDict) -> None:
    c.total_steps = 100_000
    c.batch_size = 256
    c.ema_rate = 0.999
    c.data.update(name="fashion_mnist", split="train", idx_dir="", flip=False)
    c.model.update(patch_size=4, hidden_size=384, depth=6, num_heads=6)
    c.optimizer.lr = 2e-4
    c.checkpoint.every = 5_000
    c.eval.update(every=10_000, num_samples=10_000, batch_size=512)
    c.eval.metrics = ("fd_fashion_mnist",)


def cpu(c: ConfigDict) -> None:
    """A network and a budget as for digits, for a table of all methods without a GPU."""
    c.total_steps = 6400
    c.batch_size = 64
    c.ema_rate = 0.99
    c.model.update(hidden_size=64, depth=3, num_heads=4)
    if "class_dropout" in c.objective:
        c.objective.class_dropout = 0.0  # no guidance, so no need of a null label
    c.optimizer.update(lr=4e-3, schedule="cosine", warmup_steps=100, b2=0.99)
    c.checkpoint.every = 1600
    c.eval.update(num_samples=1000, batch_size=250)
    if c.objective.name == "reflow":
        c.objective.num_pairs = 2048  # a fifth of what the shortcut model takes, as for digits


def small(c: ConfigDict) -> None:
    """Seconds instead of hours, for tests: the same code, everything smaller."""
    c.total_steps = 4
    c.batch_size = 32
    c.data.split = "test"
    c.model.update(hidden_size=32, depth=1, num_heads=2, patch_size=8)
    c.checkpoint.every = 2
    c.log.every = 1
    c.eval.update(every=0, num_samples=20, batch_size=16, steps=(1, 4), grid_rows=4)
