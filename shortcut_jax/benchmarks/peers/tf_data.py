"""The input pipeline of photographs and of latents, as tf.data does it; needs TensorFlow only.

Started by `shortcut_jax.benchmarks` with {"jpegs": folder, "image_size"} or {"latents": .npy file,
"scale"}, and "batch_size" and "count" (images). The records are written as TFRecord first. It works
in one thread.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import take_turns  # beside this file


def main(arguments: dict[str, Any]) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    batch_size = arguments["batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        datasets = {}
        if "jpegs" in arguments:
            files = sorted(Path(arguments["jpegs"]).rglob("*.jpg"))
            path = _write(tf, Path(scratch) / "jpegs", [{"x": f.read_bytes()} for f in files])
            for crop in ("adm", "authors"):
                for method in ("INTEGER_ACCURATE", "INTEGER_FAST"):
                    prepare = _photograph(tf, crop, method, arguments["image_size"])
                    datasets[f"{crop}/{method}"] = _dataset(tf, path, ["x"], prepare, batch_size)
        if "latents" in arguments:
            import numpy as np

            # [N, 2, h, w, 2c] float16
            moments = np.load(arguments["latents"], mmap_mode="r", allow_pickle=False)
            both = [{"x": pair[0].tobytes(), "mirror": pair[1].tobytes()} for pair in moments]
            plain = [{"x": pair[0].tobytes()} for pair in moments]
            two_in_one = _write(tf, Path(scratch) / "both", both)
            alone = _write(tf, Path(scratch) / "plain", plain)
            decode = _moments(tf, moments.shape[2:])
            flipped = _dataset(tf, two_in_one, ["x", "mirror"], decode, batch_size)
            datasets["latents"] = flipped
            datasets["latents/no_flip"] = _dataset(tf, alone, ["x"], decode, batch_size)
            datasets["latents/drawn"] = flipped.map(_draw(tf, arguments["scale"]))
        works = {
            name: _epoch(iter(dataset), arguments["count"]) for name, dataset in datasets.items()
        }
        take_turns({"tensorflow": tf.__version__}, works)


def _write(tf, path: Path, examples: list[dict[str, bytes]]) -> str:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            feature = {
                key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for key, value in example.items()
            }
            feature["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))
            features = tf.train.Features(feature=feature)
            writer.write(tf.train.Example(features=features).SerializeToString())
    return str(path)


def _dataset(tf, path: str, keys: list[str], prepare, batch_size: int):
    """Whole batches of {"image": prepare(record), "label"}, epoch after epoch."""
    kinds = {key: tf.io.FixedLenFeature([], tf.string) for key in keys}
    kinds["label"] = tf.io.FixedLenFeature([], tf.int64)

    def row(record):
        found = tf.io.parse_single_example(record, kinds)
        return {"image": prepare(found), "label": tf.cast(found["label"], tf.int32)}

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    # Nothing is made ahead of time: it would be made between rounds, and cost nothing in them.
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False
    dataset = tf.data.TFRecordDataset(path).repeat().map(row)
    return dataset.batch(batch_size).with_options(options)


def _photograph(tf, crop: str, method: str, size: int):
    """JPEG -> float32 [size, size, 3] in [-1, 1], mirrored with probability 1/2."""
    crop_to = {"adm": _adm, "authors": _authors}[crop]

    def prepare(record):
        image = tf.image.decode_jpeg(record["x"], channels=3, dct_method=method)
        image = tf.cast(crop_to(tf, image, size), tf.float32) / 127.5 - 1
        return tf.image.random_flip_left_right(image)

    return prepare


def _adm(tf, image, size: int):
    """As `shortcut_jax.data.crops.adm`, with the filters that TensorFlow has."""

    def levels(resized):  # Pillow gives whole grey levels after each step
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    def halved(image):
        return levels(tf.image.resize(image, tf.shape(image)[:2] // 2, "area"))

    image = tf.while_loop(
        lambda image: tf.reduce_min(tf.shape(image)[:2]) >= 2 * size,
        lambda image: (halved(image),),
        [image],
        shape_invariants=[tf.TensorShape([None, None, 3])],
    )[0]
    sides = tf.cast(tf.shape(image)[:2], tf.float64)
    sides = tf.cast(tf.round(sides * (size / tf.reduce_min(sides))), tf.int32)
    image = levels(tf.image.resize(image, sides, "bicubic", antialias=True))
    return tf.image.resize_with_crop_or_pad(image, size, size)


def _authors(tf, image, size: int):
    """As `shortcut_jax.data.crops.authors`, from whose source it is; not rounded."""
    side = tf.reduce_min(tf.shape(image)[:2])
    image = tf.image.resize_with_crop_or_pad(image, side, side)
    return tf.image.resize(image, (size, size), antialias=True)


def _moments(tf, shape):
    """Moments float16 of the image or, with probability 1/2, of its mirror image if there is."""

    def prepare(record):
        content = record["x"]
        if "mirror" in record:
            content = tf.where(tf.random.uniform([]) < 0.5, record["mirror"], content)
        return tf.reshape(tf.io.decode_raw(content, tf.float16), shape)

    return prepare


def _draw(tf, scale: float):
    """A batch of latents from the posterior of a batch of moments."""

    def drawn(batch):
        mean, logvar = tf.split(tf.cast(batch["image"], tf.float32), 2, axis=-1)
        noise = tf.random.normal(tf.shape(mean))
        return {**batch, "image": scale * (mean + tf.exp(0.5 * logvar) * noise)}

    return drawn


def _epoch(batches, count: int):
    """Reads `count` rows; going on with one iterator, as starting one takes TensorFlow a while."""

    def work() -> int:
        done = 0
        while done < count:
            done += len(next(batches)["label"])
        return done

    return work


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
