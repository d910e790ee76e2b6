"""CelebA-HQ 256x256, unconditional, in the latents of Stable Diffusion's autoencoder.

Not run during development, where neither the images nor the autoencoder's weights could be had; the
tests train `:small`, the same code on photographs. The values are the paper's (docs/differences.md
where its released code has others).

  row of Table 1   DiT-B/2
  expected FID-50k 6.9 / 13.8 / 20.5 in 128 / 4 / 1 steps; under the protocol `authors`, with their
                   statistics: docs/checkpoints.md
  hardware         the paper: TPU-v3. Fits 8 cores of 16 GB
  cost             400,000 updates of 64 images; each row 3.5 forward passes

  python -m shortcut_jax.prepare --source=celeba_hq_256.zip --name=celebahq --preset=celebahq
  python -m shortcut_jax.download sd-vae-ft-mse --out=vae.safetensors
  python -m shortcut_jax.download inception-2015-12-05 --out=inception.pth
  python -m shortcut_jax.cache_latents --config=configs/celebahq.py --out=/data/latents \
      --config.autoencoder.weights=vae.safetensors
  python -m shortcut_jax.main --config=configs/celebahq.py --workdir=runs/celebahq \
      --config.autoencoder.weights=vae.safetensors --config.data.latents=/data/latents
  python -m shortcut_jax.eval --config=configs/celebahq.py --workdir=runs/celebahq \
      --config.autoencoder.weights=vae.safetensors --config.eval.inception_weights=inception.pth

Data: the folder or zip of 30,000 images that is handed round, or TFDS's celeb_a_hq/256 with
--config.data.builder=celeb_a_hq/256 (docs/data.md). Other rows:
--config=configs/celebahq.py:objective=flow_matching.
"""

from ml_collections import ConfigDict

from shortcut_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
    """See `shortcut_jax.config.build` for what `arg` may say."""
    return config_lib.build(arg, base, {"small": config_lib.small_latents})


def base(c: ConfigDict) -> None:
    config_lib.latent_images(c, builder="celebahq", num_classes=1)
    c.total_steps = 400_000
    c.batch_size = 64
    c.objective.cfg_scale = 0.0
    c.objective.class_dropout = 1.0
