"""scikit-learn's digits: 1,797 real 8x8 images, minutes on any CPU."""

from ml_collections import ConfigDict

from shortcut_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    return config_lib.build(arg, base, {"small": small})


def base(c: ConfigDict) -> None:
    c.total_steps = 6400
    c.batch_size = 64
    c.ema_rate = 0.995
    c.data.name = "digits"
    c.data.split = "train+test"
    c.model.update(hidden_size=64, depth=3, num_heads=4, patch_size=2)
    c.optimizer.lr = 1e-3
    c.checkpoint.every = 1600
    c.log.every = 100
    c.eval.update(every=1600, num_samples=1797, batch_size=256)
    c.eval.metrics = ("fd_digits", "fd_digits_mlp64")


def small(c: ConfigDict) -> None:
    """Seconds instead of minutes, for tests: same code, smaller everything."""
    c.total_steps = 8
    c.batch_size = 32
    c.model.update(hidden_size=32, depth=1, num_heads=2)
    c.checkpoint.every = 4
    c.log.every = 2
    c.eval.update(
        every=4, num_samples=50, batch_size=32, steps=(1, 4), steps_in_loop=(1,), grid_rows=4
    )
