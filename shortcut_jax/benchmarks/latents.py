"""Records of a cache of latents: read, and drawn from their posterior."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import latent_cache, rng, spaces
from shortcut_jax.benchmarks import Measurement, Options, timing
from shortcut_jax.benchmarks.peer import Peer
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.data import pipeline
from shortcut_jax.data.sources import Dataset
from shortcut_jax.models.autoencoder import SCALE
from shortcut_jax.parallel import sharding

DRAWS = 16  # batches drawn in a round


def measure(options: Options, scratch: Path) -> Iterator[Measurement]:
    """Records per second: read with flips; drawn, on this back end; and both."""
    # As many shards as a batch of ImageNet's 313 would meet, of fewer rows.
    count, shard_rows, side, batch_size = (64, 8, 4, 16) if options.small else (4096, 16, 32, 256)
    cache = make_cache(scratch / "latents", count, (side, side, 8), shard_rows)
    conditions: dict[str, Any] = {
        "images": count,
        "shards": count // shard_rows,
        "moments": [side, side, 8],
        "dtype": str(cache.dtype),
        "batch_size": batch_size,
    }
    draw = _draw(options.small)
    contenders: dict[str, Callable[[], Took]] = {
        "read": functools.partial(_read, cache, batch_size),
        "drawn": _drawn(cache, batch_size, draw),
        "read_and_drawn": functools.partial(_read, cache, batch_size, draw),
    }
    theirs = {"read": "latents", "read_no_flip": "latents/no_flip"}
    theirs["read_and_drawn"] = "latents/drawn"
    with contextlib.ExitStack() as stack:
        if options.tf_python:
            arrays = scratch / "latents.npy"
            rows = np.arange(count)
            np.save(arrays, np.stack([cache.rows(rows + m)["image"] for m in (0, count)], axis=1))
            arguments = {"latents": str(arrays), "scale": SCALE}
            arguments |= {"batch_size": batch_size, "count": count}
            peer = Peer("tf_python", options.tf_python, "tf_data.py", arguments)
            stack.enter_context(peer)
            conditions |= peer.versions
            for name, run in theirs.items():
                contenders[f"{name}/tf_data"] = functools.partial(peer.run, run)
        found = timing.rounds(contenders, options.repeats)
    for name, took in found.items():
        yield from timing.rates(f"data/latents/{name}", took, "records", conditions)
    for name in theirs if options.tf_python else ():
        ours = found["read" if name == "read_no_flip" else name]
        title = f"data/latents/{name}: ours / tf_data"
        yield timing.ratio(title, ours, found[f"{name}/tf_data"], conditions)


def make_cache(
    folder: Path, count: int, moments_shape: tuple[int, int, int], shard_rows: int
) -> Dataset:
    """Makes and opens a cache of moments that are drawn from a normal distribution, float16."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 1000, count, np.int32)
    images = Dataset(
        name="nothing", split="train", image_shape=(1, 1, 3), num_classes=1000, size=count,
        fingerprint="", read=lambda i: {"image": np.zeros((len(i), 1, 1, 3)), "label": labels[i]},
    )  # fmt: skip

    def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(rows), *moments_shape)
        return random.standard_normal(shape, np.float32), random.standard_normal(shape, np.float32)

    section = {
        "builder": "nothing", "split": "train", "image_size": 1, "crop": "adm", "num_classes": 1000
    }  # fmt: skip
    contents = latent_cache.describe(section, {"kind": "sd", "scale": SCALE}, sha256="")
    latent_cache.make(
        folder, images, encode, contents, moments_shape=moments_shape, shard_rows=shard_rows
    )
    return latent_cache.open_cache(folder, contents, num_classes=1000)


def _draw(small: bool) -> Callable[[int, Any], jax.Array]:
    """x_1 from a batch of moments at a step, as the training step draws it."""
    kind = "tiny" if small else "sd"
    space = spaces.Latents(kind, "random", SCALE, sharding.local_mesh())  # weights stay unread
    return jax.jit(lambda step, moments: space.draw(rng.draws(0, "train", step), moments))


def _read(
    cache: Dataset, batch_size: int, draw: Callable[[int, Any], jax.Array] | None = None
) -> Took:
    """One epoch with flips, read in one thread; no work of another epoch is in the time."""

    def work() -> int:
        steps = cache.size // batch_size
        with pipeline.batches(
            cache, batch_size=batch_size, seed=0, start_step=0, num_steps=steps, flip=True,
            num_threads=1,
        ) as batches:  # fmt: skip
            for step, batch in enumerate(batches):
                if draw is not None:
                    draw(step, jnp.asarray(batch["image"])).block_until_ready()
        return steps * batch_size

    return timing.timed(work)


def _drawn(
    cache: Dataset, batch_size: int, draw: Callable[[int, Any], jax.Array]
) -> Callable[[], Took]:
    moments = jnp.asarray(cache.rows(np.arange(batch_size))["image"])

    def work() -> int:
        for step in range(DRAWS):
            draw(step, moments).block_until_ready()
        return DRAWS * batch_size

    return lambda: timing.timed(work)
