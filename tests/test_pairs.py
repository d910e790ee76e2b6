"""Pairs of noise and sample: what they are, that a killed run goes on, and what is refused."""

import functools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import manifest, pairs, pretrained, run, sampling, state
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import base
from shortcut_jax.parallel import sharding
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import param_shapes, save_run, small

SHARDS = ("00000.npy", "00001.npy", "00002.npy")  # of 4, 4 and 2 pairs
# Products of other shapes add their terms in another order, and 4 steps carry that on.
ATOL = 1e-5


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "SHARD_ROWS", 4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Workdir of a flow-matching run that has seen the null label."""
    workdir = tmp_path_factory.mktemp("runs") / "flow"
    save_run(workdir, small("flow_matching", **{"objective.class_dropout": 0.1}), steps=(2, 4))
    return workdir


def make(teacher, workdir, **overrides):
    config = small("reflow", teacher=str(teacher), **overrides)
    setup = run.prepare(config)
    return pairs.prepare(setup, pretrained.find(config).teacher, workdir)


def all_rows(made):
    return made.rows(np.arange(made.size))


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    """Workdir of a run with its ten pairs, and their rows."""
    workdir = tmp_path_factory.mktemp("runs") / "reflow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SHARD_ROWS", 4)
        return workdir, all_rows(make(teacher, workdir))


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


# ------------------------------------------------------------------ what they are


def test_layout(made):
    workdir, rows = made
    assert set(contents(workdir / "pairs")) == {"manifest.json", *SHARDS}
    kinds = {name: (a.shape, a.dtype.name) for name, a in rows.items()}
    image = (10, 8, 8, 1)
    assert kinds == {
        "noise": (image, "float32"), "image": (image, "float32"), "label": ((10,), "int32"),
    }  # fmt: skip


def test_noises_are_normal_and_no_two_are_the_same(made):
    noise = made[1]["noise"].reshape(10, -1)
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    assert set(made[1]["label"]) <= set(range(10)) and len(set(made[1]["label"])) > 3


def integrate(teacher, noise, labels, num_steps, cfg_scale=1.0):
    """Samples of the teacher's EMA by the evaluation's sampling loop, from these noises."""
    overrides = {"objective.cfg_scale": cfg_scale, "objective.class_dropout": 0.1}
    setup = run.prepare(small("flow_matching", **overrides))
    shapes = param_shapes(setup)
    found = pretrained.find(small("reflow", teacher=str(teacher))).teacher
    params = found.params(shapes, sharding.shard_tree(shapes, setup.mesh))
    velocity = base.sampling_velocity(
        setup.objective, functools.partial(state.apply_fn(setup.network), params), guided=True
    )
    sample = jax.jit(
        lambda x, labels: sampling.integrate(
            setup.objective, velocity, x, labels, num_steps, noise=None
        )
    )
    return np.asarray(sample(jnp.asarray(noise), jnp.asarray(labels)))


def test_images_are_what_evaluating_the_teacher_makes_of_the_noises(made, teacher):
    rows = made[1]
    expected = integrate(teacher, rows["noise"], rows["label"], num_steps=4)
    np.testing.assert_allclose(rows["image"], expected, rtol=0, atol=ATOL)
    assert np.abs(expected - rows["noise"]).mean() > 0.1  # the teacher did something
    for other in (
        integrate(teacher, rows["noise"], rows["label"], num_steps=5),
        integrate(teacher, rows["noise"], (rows["label"] + 1) % 10, num_steps=4),
    ):
        assert np.abs(other - rows["image"]).max() > 100 * ATOL


def test_guidance_is_in_the_pairs_of_any_seed(teacher, tmp_path):
    overrides = {"objective.cfg_scale": 2.0, "objective.num_pairs": 3, "seed": 5}
    rows = all_rows(make(teacher, tmp_path, **overrides))
    expected = integrate(teacher, rows["noise"], rows["label"], num_steps=4, cfg_scale=2.0)
    np.testing.assert_allclose(rows["image"], expected, rtol=0, atol=ATOL)
    plain = integrate(teacher, rows["noise"], rows["label"], num_steps=4)
    assert np.abs(plain - rows["image"]).max() > 100 * ATOL


def test_noises_are_those_of_no_evaluation(made):
    config = small("reflow")
    assert config.seed == config.eval.seed  # the seeds do not keep them apart
    noise, _ = sampling.initial(config.eval.seed, jnp.arange(200, dtype=jnp.uint32), (8, 8, 1), 10)
    distances = np.abs(np.asarray(noise)[:, None] - made[1]["noise"][None]).max(axis=(2, 3, 4))
    assert distances.min() > 0.5


def test_the_batch_size_plays_no_part(made, teacher, tmp_path):
    again = make(teacher, tmp_path, **{"eval.batch_size": 3})
    assert_same_pairs(all_rows(again), made[1])
    assert (
        contents(tmp_path / "pairs")["manifest.json"]
        == contents(made[0] / "pairs")["manifest.json"]
    )  # so another batch size may go on with these pairs


def assert_same_pairs(found, expected):
    for name in ("noise", "label"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["image"], expected["image"], rtol=0, atol=ATOL)


def test_more_pairs_begin_with_the_same_ones(made, teacher, tmp_path):
    more = make(teacher, tmp_path, **{"objective.num_pairs": 13})
    assert more.size == 13
    assert_same_pairs(more.rows(np.arange(10)), made[1])


def test_another_seed_makes_other_pairs(made, teacher, tmp_path):
    overrides = {"seed": 1, "objective.num_pairs": 4}
    noise = all_rows(make(teacher, tmp_path, **overrides))["noise"]
    assert np.abs(noise - made[1]["noise"][:4]).max(axis=(1, 2, 3)).min() > 0.5


def test_eight_devices_make_the_pairs_of_one(run_python, teacher, tmp_path):
    specs = ("1,1", "8,1", "1,8")
    args = ["-m", "tests.programs.make_pairs", str(tmp_path), str(teacher), *specs]
    assert run_python(args, devices=8, timeout=280).returncode == 0
    one, *others = (dict(np.load(tmp_path / f"{spec}.npz")) for spec in specs)
    for other in others:
        assert_same_pairs(other, one)
    manifests = {(tmp_path / spec / "pairs" / "manifest.json").read_bytes() for spec in specs}
    assert len(manifests) == 1


# ------------------------------------------------------------------ as a data set


def test_rows_in_any_order_and_number(copy, teacher, made):
    dataset = make(teacher, copy)
    indices = np.array([9, 0, 4, 4, 3, 8])
    for name, a in dataset.rows(indices).items():
        np.testing.assert_array_equal(a, made[1][name][indices])
    with pytest.raises(IndexError):
        dataset.rows(np.array([10]))


def test_what_is_read_may_be_written_over(copy, teacher):
    make(teacher, copy).rows(np.array([1]))["image"][:] = 0  # files are mapped into memory
    assert make(teacher, copy).rows(np.array([1]))["image"].any()


def test_the_fingerprint_is_that_of_the_manifest(made, copy, teacher, tmp_path):
    first = make(teacher, copy)
    assert make(teacher, made[0]).fingerprint == first.fingerprint
    other = make(teacher, tmp_path / "other", **{"objective.num_pairs": 2})
    assert other.fingerprint != first.fingerprint
    assert (first.image_shape, first.num_classes, first.size) == ((8, 8, 1), 10, 10)


# ------------------------------------------------------------------ killed and started again


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", ["00000.npy", "00001.npy"])
def test_a_killed_run_goes_on_at_the_missing_shard(made, teacher, tmp_path, monkeypatch, killed_at):
    def write(path, data):
        if path.name == killed_at:
            raise Killed
        os.replace(_written(tmp_path / "whole", data), path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(manifest, "write_atomically", write)
        make(teacher, tmp_path)
    folder = tmp_path / "pairs"
    finished = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert [p.name for p in sorted(finished)] == [*SHARDS[: SHARDS.index(killed_at)],
                                                  "manifest.json"]  # fmt: skip
    again = make(teacher, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in finished} == finished  # none of them is made twice
    assert contents(folder) == contents(made[0] / "pairs")
    for name, a in all_rows(again).items():
        np.testing.assert_array_equal(a, made[1][name])


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_shard_missing_in_the_middle_is_made_again(made, teacher, copy):
    (copy / "pairs" / SHARDS[1]).unlink()
    make(teacher, copy)
    assert contents(copy / "pairs") == contents(made[0] / "pairs")


def test_whole_pairs_need_no_sampling(teacher, copy, monkeypatch):
    monkeypatch.setattr(sampling, "make_sampler", None)
    assert make(teacher, copy).size == 10


# ------------------------------------------------------------------ refused


def refused(teacher, workdir, **overrides):
    """What is said when pairs are refused; nothing is changed."""
    before = contents(workdir / "pairs")
    with pytest.raises(UserError) as error:
        make(teacher, workdir, **overrides)
    assert contents(workdir / "pairs") == before
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("objective.num_pairs", 12, "count: 10 -> 12"),
        ("objective.pair_steps", 8, "steps: 4 -> 8"),
        ("objective.cfg_scale", 2.0, "cfg_scale: 1.0 -> 2.0"),
        ("seed", 3, "seed: 0 -> 3"),
        ("model.dtype", "bfloat16", "matrix_products: float32 -> bfloat16"),
    ],
)
def test_pairs_of_another_config(teacher, copy, key, value, line):
    said = refused(teacher, copy, **{key: value})
    assert_sentence(said, (f"{copy / 'pairs'} holds other pairs", line, "another --workdir"))
    assert said.count(" -> ") == 2  # that line and the legend


def test_all_that_differs_is_named(teacher, copy, monkeypatch):
    monkeypatch.setattr(pairs, "SHARD_ROWS", 5)
    said = refused(teacher, copy, **{"seed": 3, "objective.pair_steps": 8})
    assert_sentence(said, ("seed: 0 -> 3", "steps: 4 -> 8", "shard_rows: 4 -> 5"))


def test_pairs_of_another_checkpoint_of_the_teacher(teacher, copy):
    said = refused(f"{teacher}/checkpoints/2", copy)
    assert_sentence(said, ("teacher_step: 4 -> 2", "teacher_digest: ", "Use that teacher"))


def test_pairs_of_a_teacher_that_was_trained_again(teacher, copy, tmp_path):
    other = tmp_path / "flow"
    shutil.copytree(teacher, other)
    shutil.rmtree(other / "checkpoints" / "4")
    (other / "checkpoints" / "2").rename(other / "checkpoints" / "4")
    said = refused(other, copy)
    assert_sentence(said, ("teacher_digest: ",))
    assert "teacher_step" not in said


def test_a_manifest_of_another_version(teacher, copy):
    path = copy / "pairs" / "manifest.json"
    path.write_text(json.dumps({"rows": 3, **json.loads(path.read_text())}))
    assert_sentence(refused(teacher, copy), ("rows: 3 -> None",))


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_a_damaged_manifest(teacher, copy, content):
    (copy / "pairs" / "manifest.json").write_bytes(content)
    said = refused(teacher, copy)
    assert_sentence(said, ("manifest.json cannot be read as JSON", "manifest of the pairs"))


def test_pairs_without_a_manifest_may_be_any_pairs(teacher, copy):
    (copy / "pairs" / "manifest.json").unlink()
    assert_sentence(
        refused(teacher, copy), ("no manifest.json", "restore it, or remove that folder")
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: shard[:-10],
        lambda shard: shard[:50],
        lambda shard: b"",
        lambda shard: b"of another program",
    ],
    ids=["cut", "cut in the header", "empty", "foreign"],
)
@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[2]])
def test_a_damaged_shard(teacher, copy, made, damage, name):
    path = copy / "pairs" / name
    path.write_bytes(damage(path.read_bytes()))
    said = refused(teacher, copy)
    size = 4 if name == SHARDS[0] else 2
    assert_sentence(said, (str(path), "cannot be read", f"expected {size}", "remove that file"))
    path.unlink()  # as it says
    for key, a in all_rows(make(teacher, copy)).items():
        np.testing.assert_array_equal(a, made[1][key])


def test_a_shard_of_other_rows(teacher, copy):
    path = copy / "pairs" / SHARDS[2]
    shutil.copy(copy / "pairs" / SHARDS[0], path)
    assert_sentence(refused(teacher, copy), (str(path), "it holds (4,)", "expected 2 of them"))


def test_a_file_in_place_of_the_folder(teacher, tmp_path):
    (tmp_path / "pairs").write_text("mine")
    with pytest.raises(UserError) as error:
        make(teacher, tmp_path)
    assert_sentence(
        str(error.value), (str(tmp_path / "pairs"), "cannot be written", "choose another folder")
    )
    assert (tmp_path / "pairs").read_text() == "mine"


def test_no_room(teacher, tmp_path, monkeypatch):
    def write(path, data):
        if path.name in SHARDS:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(manifest, "write_atomically", write)
    with pytest.raises(UserError) as error:
        make(teacher, tmp_path)
    assert_sentence(str(error.value), (SHARDS[0], "No space left", "make room", "0.0 MiB"))
