"""Latents: drawn from moments, the same from a cache and encoded on the way; caches and damage."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from shortcut_jax import latent_cache, pretrained, rng, run, sampling, spaces
from shortcut_jax.data import pipeline
from shortcut_jax.errors import UserError
from shortcut_jax.models import autoencoder
from shortcut_jax.parallel import sharding
from shortcut_jax.weights import autoencoder_weights
from tests.photographs import write_folder
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import save_run

SHAPE = (4, 4, 8)  # of the moments of 32x32 images
COUNT = 20

plain_encode = jax.jit(functools.partial(autoencoder.encode, architecture=autoencoder.TINY))
plain_decode = jax.jit(functools.partial(autoencoder.decode, architecture=autoencoder.TINY))


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "SHARD_ROWS", 8)
        yield


@pytest.fixture(scope="module")
def setup(photographs_dir):
    config = imagenet.get_config("small")
    config.data.data_dir = str(photographs_dir)
    return run.prepare(config)


@pytest.fixture(scope="module")
def images(setup):
    return run.open_data(setup)[0]


def wanted(setup):
    return latent_cache.describe(setup.config.data, setup.config.autoencoder, setup.space.sha256)


def make(setup, images, folder, encode=None, **options):
    encode = encode or latent_cache.encoder(setup.space, batch_size=5)
    options = {"batch_size": 5, "moments_shape": SHAPE, **options}
    return latent_cache.make(folder, images, encode, wanted(setup), **options)


@pytest.fixture(scope="module")
def cache(setup, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    assert make(setup, images, folder) == 0
    return folder


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "copy")


def opened(setup, folder):
    return latent_cache.open_cache(folder, wanted(setup), num_classes=2)


# ------------------------------------------------------------------ what they are


def test_layout(setup, cache):
    files = {f"{i:05d}.{kind}" for i in range(3) for kind in ("arrayrecord", "json")}
    assert set(contents(cache)) == {"manifest.json", *files}
    found = json.loads((cache / "manifest.json").read_text())
    assert found["autoencoder_sha256"] == setup.space.sha256 and found["scale"] == 0.18215
    assert (found["crop"], found["image_size"], found["count"]) == ("adm", 32, COUNT)
    assert found["dtype"] == "float16"


def test_rows_are_the_moments_of_image_and_mirror(setup, images, cache):
    cached = opened(setup, cache)
    assert (cached.size, cached.image_shape, cached.holds) == (COUNT, SHAPE, "moments")
    order = np.array([3, 19, 0, 11])
    rows = images.rows(order)
    params = autoencoder_weights.load("random", "tiny").params
    for mirrored in (False, True):
        picture = rows["image"][:, :, ::-1] if mirrored else rows["image"]
        expected = np.concatenate(plain_encode(params, picture / np.float32(127.5) - 1), axis=-1)
        found = cached.rows(order + COUNT * mirrored)
        assert found["image"].dtype == np.float16
        np.testing.assert_allclose(found["image"], expected, rtol=2**-10, atol=1e-4)
        np.testing.assert_array_equal(found["label"], rows["label"])
    # The mirror of the moments is something else: the encoder is not symmetric.
    plain, mirror = cached.rows(order)["image"], cached.rows(order + COUNT)["image"]
    assert np.abs(plain[:, :, ::-1].astype(float) - mirror).max() > 0.05


def test_x1_is_drawn_from_the_posterior(setup):
    mean, logvar = np.full((6, 4, 4, 4), 2.0), np.full((6, 4, 4, 4), np.log(0.25))
    moments = jnp.asarray(np.concatenate([mean, logvar], axis=-1), jnp.float32)

    def x1(step):
        return np.asarray(setup.space.draw(rng.draws(0, "train", step), moments))

    many = np.stack([x1(step) for step in range(200)]) / 0.18215
    np.testing.assert_allclose(many.mean(0), 2.0, atol=0.2)
    np.testing.assert_allclose(many.std(0), 0.5, atol=0.15)
    assert many.mean() == pytest.approx(2.0, abs=0.01) and many.std() == pytest.approx(0.5, 0.02)
    np.testing.assert_array_equal(x1(7), x1(7))
    assert len(np.unique(many[0])) == many[0].size  # every row and pixel has noise of its own


@pytest.mark.parametrize("step", [0, 3])
def test_cached_latents_equal_those_encoded_on_the_way(setup, images, cache, step):
    drawn = []
    for dataset in (images, opened(setup, cache)):
        encode, draw_x1 = spaces.way_from(setup.space, dataset.holds)
        with pipeline.batches(
            dataset, batch_size=16, seed=1, start_step=step, num_steps=1, flip=True
        ) as batches:
            batch = next(batches)
        x1 = draw_x1(rng.draws(1, "train", step), encode(jnp.asarray(batch["image"])))
        drawn.append((np.asarray(x1), batch["label"]))
    (way, way_labels), (cached, cached_labels) = drawn
    np.testing.assert_array_equal(way_labels, cached_labels)
    # float16 rounds mean and log-variance by at most 2^-11 of themselves.
    np.testing.assert_allclose(cached, way, atol=2**-10 * np.abs(way).max())
    assert np.abs(cached - np.roll(way, 1, axis=0)).max() > 0.1  # other rows are far from equal


def test_pairs_of_a_teacher_are_latents_already(setup):
    encode, draw_x1 = spaces.way_from(setup.space, "samples")
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    np.testing.assert_array_equal(draw_x1(rng.draws(0, "train", 0), encode(x)), x)


@pytest.mark.parametrize("rows", [2, 2 * spaces.AT_ONCE + 1])
def test_samples_go_back_through_the_decoder(setup, rows):
    x = jax.random.normal(jax.random.key(0), (rows, 4, 4, 4))
    params = autoencoder_weights.load("random", "tiny").params
    expected = plain_decode(params, x / 0.18215)
    np.testing.assert_allclose(setup.space.decode(x), expected, rtol=1e-5, atol=1e-5)


def test_the_hash_of_the_weights_takes_no_device(setup, images, monkeypatch):
    """A process that fails beside this one cannot be waited for, and memory is scarce."""
    monkeypatch.setattr(sharding, "replicate", lambda *_: pytest.fail("they were placed"))
    space = spaces.Latents("tiny", "random", 1.0, setup.mesh)
    assert space.identify(images).fingerprint == setup.space.identify(images).fingerprint
    assert space.record() == setup.space.record()


@pytest.mark.parametrize("way, shape", [("decode", (8, 8, 4)), ("encode", (64, 64, 3))])
def test_memory_does_not_grow_with_the_rows(setup, way, shape):
    def temporaries(rows):
        compiled = jax.jit(getattr(setup.space, way)).lower(jnp.zeros((rows, *shape))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(spaces.AT_ONCE), temporaries(8 * spaces.AT_ONCE)
    assert many < 1.5 * few


# ------------------------------------------------------------------ making them


def test_several_tasks_make_what_one_makes(setup, images, cache, tmp_path):
    assert make(setup, images, tmp_path, task=(1, 2)) == 2
    with pytest.raises(UserError, match=r"00000\.arrayrecord is missing"):
        opened(setup, tmp_path)
    assert make(setup, images, tmp_path, task=(0, 2)) == 0
    assert contents(tmp_path) == contents(cache)


def test_a_killed_task_goes_on_at_the_shard_it_reached(setup, images, cache, tmp_path):
    encode, calls = latent_cache.encoder(setup.space, batch_size=5), []

    def killed(batch):
        calls.append(len(batch))
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        make(setup, images, tmp_path, killed)
    before = (tmp_path / "00000.arrayrecord").stat().st_mtime_ns
    make(setup, images, tmp_path)
    assert (tmp_path / "00000.arrayrecord").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(cache)


def test_bfloat16(setup, images, tmp_path):
    make(setup, images, tmp_path, dtype="bfloat16")
    cached = opened(setup, tmp_path)
    assert cached.dtype == jnp.bfloat16 and cached.rows(np.array([0]))["image"].dtype == "bfloat16"


def test_what_float16_cannot_hold(setup, images, tmp_path):
    def encode(batch):
        moments = np.zeros((len(batch), *SHAPE), np.float32)
        moments[1, 0, 0, 0] = 1e5
        return moments, moments

    with pytest.raises(UserError) as error:
        make(setup, images, tmp_path, encode)
    assert_sentence(str(error.value), ("Image 1 has latents", "float16", "--dtype=bfloat16"))
    assert not list(tmp_path.glob("*.arrayrecord"))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("data.image_size", 64, "image_size: 32 -> 64"),
        ("data.crop", "authors", "crop: adm -> authors"),
        ("data.builder", "imagenet2012", "builder: photographs -> imagenet2012"),
        ("data.split", "train+test", "split: train -> train+test"),
        ("data.num_classes", 1, "num_classes: 2 -> 1"),
        ("autoencoder.scale", 0.13025, "scale: 0.18215 -> 0.13025"),
        ("autoencoder.kind", "sd", "autoencoder: tiny -> sd"),
    ],
)
def test_another_config(setup, cache, key, value, fragment):
    config = setup.config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        opened(dataclasses.replace(setup, config=config), cache)
    assert_sentence(str(error.value), (str(cache), fragment, "Use the config"))


def test_other_weights(setup, cache):
    with pytest.raises(UserError) as error:
        latent_cache.open_cache(cache, {**wanted(setup), "autoencoder_sha256": "0" * 64}, 2)
    fragment = f"autoencoder_sha256: {setup.space.sha256} -> {'0' * 64}"
    assert_sentence(str(error.value), (fragment,))


def test_a_folder_of_others_is_not_added_to(setup, images, copy):
    before = contents(copy)
    with pytest.raises(UserError) as error:
        make(setup, images, copy, dtype="bfloat16")
    assert_sentence(str(error.value), ("dtype: float16 -> bfloat16", "nothing was changed"))
    assert contents(copy) == before


def damaged(setup, folder):
    with pytest.raises(UserError) as error:
        opened(setup, folder)
    return str(error.value)


def test_no_latents(setup, tmp_path):
    assert_sentence(damaged(setup, tmp_path), (f"data.latents={tmp_path}", "cache_latents"))


def test_missing_and_truncated_shards(setup, copy):
    path = copy / "00002.arrayrecord"
    path.write_bytes(path.read_bytes()[:-100])
    assert_sentence(damaged(setup, copy), (str(path), "not whole", "expected 4 images"))
    path.unlink()
    assert_sentence(damaged(setup, copy), (str(path), "0 bytes", "remove 00002.json"))


def test_verify_finds_a_flipped_bit(setup, images, copy, cache):
    assert latent_cache.verify(copy) == COUNT
    path = copy / "00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        latent_cache.verify(copy)
    assert_sentence(str(error.value), (str(path), "damaged", "00001.json"))
    # What the sentence says mends it.
    path.unlink()
    (copy / "00001.json").unlink()
    make(setup, images, copy)
    assert contents(copy) == contents(cache)


@pytest.mark.parametrize("side", [30, 36])
def test_images_without_latents(side):
    config = imagenet.get_config("small")
    config.data.image_size = side
    with pytest.raises(UserError) as error:
        run.check(config)
    assert_sentence(str(error.value), ("data.image_size", "multiples of 8"))


@pytest.mark.parametrize(
    ("removed", "latents", "fragments"),
    [
        ("autoencoder.scale", "", ("no key autoencoder.scale", "or none")),
        ("autoencoder", "cache", ("data.latents=cache is set", "no section autoencoder")),
    ],
)
def test_half_a_config_of_latents(removed, latents, fragments):
    config = imagenet.get_config("small")
    config.data.latents = latents
    section, _, key = removed.rpartition(".")
    with config.unlocked():
        del (config[section] if section else config)[key]
    with pytest.raises(UserError) as error:
        run.check(config)
    assert_sentence(str(error.value), fragments)


def test_evaluation_in_another_space_is_refused(setup, tmp_path):
    run.claim_workdir(setup.config, tmp_path)
    config = setup.config.copy_and_resolve_references()
    config.autoencoder.weights = "moved.safetensors"
    run.check_workdir_for_evaluation(config, tmp_path)
    config.autoencoder.scale = 0.13025
    with pytest.raises(UserError, match=r"autoencoder.scale: 0.18215 -> 0.13025"):
        run.check_workdir_for_evaluation(config, tmp_path)


def test_starting_from_a_run_in_another_space_is_refused(setup, tmp_path):
    save_run(tmp_path, setup.config)
    config = setup.config.copy_and_resolve_references()
    config.init_from = str(tmp_path)
    assert pretrained.find(config).init_from is not None
    config.autoencoder.scale = 0.13025
    with pytest.raises(UserError, match=r"autoencoder.scale: 0.18215 there, 0.13025 here"):
        pretrained.find(config)


def test_local_mesh_has_the_devices_of_this_process():
    assert list(sharding.local_mesh().devices.flat) == jax.local_devices()


# ------------------------------------------------------------------ the commands


def test_from_files_to_samples(run_python, tmp_path):
    """Folder -> prepared set -> cache -> training -> checkpoint -> evaluation and pictures."""
    source = write_folder(tmp_path / "jpegs")
    small = "--config=configs/imagenet.py:small"
    at = [small, f"--config.data.data_dir={tmp_path}", "--config.log.tensorboard=False"]
    cache, workdir = tmp_path / "latents", tmp_path / "run"

    def done(module, *args):
        process = run_python(["-m", f"shortcut_jax.{module}", *args], timeout=280)
        assert process.returncode == 0, process.stderr[-2000:]
        return process.stdout

    name = ["--name=photographs", f"--data_dir={tmp_path}", "--workers=0"]
    done("prepare", f"--source={source}", *name)
    done("cache_latents", *at, f"--out={cache}")
    assert "20 images" in done("cache_latents", *at, f"--out={cache}", "--verify")
    run_flags = [*at, f"--workdir={workdir}", "--config.total_steps=2"]
    done("main", *run_flags, f"--config.data.latents={cache}")
    done("eval", *run_flags, f"--save_samples={tmp_path / 'samples.npz'}")
    assert {p.name for p in (workdir / "eval" / "2").iterdir()} == {"samples.png"}
    with np.load(tmp_path / "samples_4.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (20, 32, 32, 3) and set(labels) <= {0, 1}

    # The same samples from a notebook; another file than that of training can be named.
    model = sampling.load(workdir)
    again = model.sample(num_steps=4, num=16)
    assert np.abs(again.astype(int) - images[:16]).max() <= 1
    moved = sampling.load(workdir, autoencoder=tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"autoencoder.weights: .*absent.safetensors does not ex"):
        moved.sample(num_steps=1)


def test_no_name_of_the_folder(run_python):
    done = run_python(["-m", "shortcut_jax.cache_latents", "--config=configs/imagenet.py:small"])
    assert done.returncode == 2 and "error: --out is missing" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task_index=0"], "do not name a task"),
        (["--task_index=2", "--task_count=2"], "do not name a task"),
        (["--verify", "--task_index=0", "--task_count=2"], "--task_index is given, but --verify"),
    ],
    ids=["half", "beyond", "verify"],
)
def test_tasks_that_there_are_not(run_python, tmp_path, flags, said):
    at = ["--config=configs/imagenet.py:small", f"--out={tmp_path}"]
    done = run_python(["-m", "shortcut_jax.cache_latents", *at, *flags])
    assert done.returncode == 2 and said in done.stderr
    assert not list(Path(tmp_path).iterdir())
