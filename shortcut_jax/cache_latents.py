"""Encodes a data set once, so that training reads latents instead of images.

  python -m shortcut_jax.cache_latents --config=configs/imagenet.py --out=/data/latents \\
      --config.autoencoder.weights=vae.safetensors
  python -m shortcut_jax.main --config=configs/imagenet.py --config.data.latents=/data/latents ...

Started again it continues at the shard it reached. Shards are shared by the processes of a pod, or
by any machines that see the folder: --task_index=0..N-1 --task_count=N. --verify reads everything
once more and compares it with what was written.
"""

from pathlib import Path

from absl import flags, logging

from shortcut_jax import config_flag
from shortcut_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "Folder of the latents.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "What they are stored as.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images encoded at once.", 1)
TASK_INDEX = flags.DEFINE_integer("task_index", None, "Which of the tasks this is.", 0)
TASK_COUNT = flags.DEFINE_integer("task_count", None, "Tasks that share the work.", 1)
VERIFY = flags.DEFINE_bool("verify", False, "Check finished latents instead of making them.")


def main() -> None:
    """Makes or verifies the latents of the config's data set."""
    import jax

    from shortcut_jax import data, latent_cache, run, spaces
    from shortcut_jax.parallel import preemption, sharding

    preemption.heed_no_longer()
    if not OUT.value:
        raise UserError("--out is missing; expected the folder of the latents: give --out=FOLDER.")
    folder, config = Path(OUT.value), config_flag.CONFIG.value
    if VERIFY.value:
        for flag in (DTYPE, BATCH_SIZE, TASK_INDEX, TASK_COUNT):
            if flag.present:
                raise UserError(
                    f"--{flag.name} is given, but --verify reads all latents as they are; expected "
                    "one of the two: leave out the other."
                )
        print(f"{latent_cache.verify(folder):,} images in {folder}: every byte is as written.")
        return
    run.check(config)
    if "autoencoder" not in config:
        raise UserError(
            "The config has no section autoencoder, so its network sees images, not latents; "
            "expected one such as configs/imagenet.py: use that."
        )
    task = _task(jax.process_index(), jax.process_count())
    space = spaces.build(config, sharding.local_mesh())
    assert isinstance(space, spaces.Latents)
    contents = latent_cache.describe(config.data, config.autoencoder, space.sha256)
    images = data.open_dataset(config.data)
    h, w, c = spaces.shape(config, images.image_shape)
    left = latent_cache.make(
        folder,
        images,
        latent_cache.encoder(space, BATCH_SIZE.value),
        contents,
        moments_shape=(h, w, 2 * c),
        dtype=DTYPE.value,
        batch_size=BATCH_SIZE.value,
        task=task,
        num_workers=config.data.workers,
    )
    others = f"; {left} shards are left to other tasks" if left else ""
    logging.info("Latents of %d images are in %s%s.", images.size, folder, others)


def _task(process_index: int, process_count: int) -> tuple[int, int]:
    given = (TASK_INDEX.value, TASK_COUNT.value)
    if given == (None, None):
        return process_index, process_count
    index, count = given
    if index is None or count is None or index >= count:
        raise UserError(
            f"--task_index={index} and --task_count={count} do not name a task; expected both, the "
            "index below the count: give, for example, --task_index=0 --task_count=4."
        )
    return index, count


if __name__ == "__main__":
    config_flag.main(main)
