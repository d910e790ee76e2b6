"""ImageNet 256x256, class-conditional, in the latents of Stable Diffusion's autoencoder.

Not run during development, where neither ImageNet nor the autoencoder's weights could be had; the
tests train `:small`, the same code on photographs. The values are the paper's (docs/differences.md
where its released code has others).

  row of Table 1   :b, the default, is DiT-B/2; :xl is DiT-XL/2 (scaling figure)
  expected FID-50k 15.5 / 28.3 / 40.3 in 128 / 4 / 1 steps (B), 3.8 / 7.8 / 10.6 (XL); under the
                   protocol `authors`, with their statistics: docs/checkpoints.md
  hardware         the paper: TPU-v3. B fits 8 cores of 16 GB, XL wants --config.mesh.fsdp=8 there
  cost             800,000 updates of 256 images, 160 epochs; each row 3.6 forward passes

  python -m shortcut_jax.prepare --source=imagenet/train --name=imagenet2012 --workers=16
  python -m shortcut_jax.download sd-vae-ft-mse --out=vae.safetensors
  python -m shortcut_jax.download inception-2015-12-05 --out=inception.pth
  python -m shortcut_jax.cache_latents --config=configs/imagenet.py --out=/data/latents \
      --config.autoencoder.weights=vae.safetensors
  python -m shortcut_jax.main --config=configs/imagenet.py --workdir=runs/imagenet \
      --config.autoencoder.weights=vae.safetensors --config.data.latents=/data/latents
  python -m shortcut_jax.eval --config=configs/imagenet.py --workdir=runs/imagenet \
      --config.autoencoder.weights=vae.safetensors --config.eval.inception_weights=inception.pth

Data: a folder or zip with one folder for each class, or TFDS's imagenet2012 as array_record, which
needs no `prepare` (docs/data.md). Other rows: --config=configs/imagenet.py:objective=flow_matching.
"""

from ml_collections import ConfigDict

from shortcut_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    """See `shortcut_jax.config.build` for what `arg` may say."""
    return config_lib.build(arg, base, {"b": b, "xl": xl, "small": small})


def base(c: ConfigDict) -> None:
    config_lib.latent_images(c, builder="imagenet2012", num_classes=1000)
    c.total_steps = 800_000
    c.objective.cfg_scale = 1.5
    c.objective.class_dropout = 0.1
    # As likely for each row as random ones, and with guidance a tenth less work.
    c.objective.step_size_sampling = "systematic"


def b(c: ConfigDict) -> None:
    """DiT-B/2, which the table compares methods with."""
    config_lib.set_model_size(c, "B/2")


def xl(c: ConfigDict) -> None:
    """DiT-XL/2."""
    config_lib.set_model_size(c, "XL/2")


def small(c: ConfigDict) -> None:
    """Seconds instead of days, for tests: the same code, everything smaller, two classes."""
    config_lib.small_latents(c)
    c.data.num_classes = 2
