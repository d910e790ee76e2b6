"""What is saved comes back, on any mesh, whole or in part; what cannot be read says so."""

import contextlib
import json
import logging
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import digits
from shortcut_jax import checkpoint, data, run
from shortcut_jax.errors import UserError

# Orbax reads arrays concurrently and drops the other reads when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = {"config": {"seed": 0}, "data": {"next_step": 3}, "clock": {"device_seconds": 1.5}}


def make_state(value=0.0):
    arrays = {"kernel": jnp.arange(12.0).reshape(3, 4) + value, "bias": jnp.full(4, value)}
    return {"step": jnp.int32(3), "params": arrays, "ema": jax.tree.map(lambda a: a / 2, arrays)}


def shapes_of(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_two(workdir):
    checkpoints = checkpoint.Checkpoints(workdir, keep=3)
    checkpoints.save(3, make_state(1.0), META)
    checkpoints.save(6, make_state(2.0), META)
    checkpoints.close()
    return workdir


@pytest.fixture
def saved(tmp_path):
    """A workdir with the checkpoints 3 and 6, which differ."""
    return save_two(tmp_path)


@pytest.fixture
def reopen():
    """reopen(workdir, **settings): its checkpoints, closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_again(workdir, **settings):
            checkpoints = checkpoint.Checkpoints(workdir, keep=3, **settings)
            stack.callback(checkpoints.close)
            return checkpoints

        yield open_again


# ------------------------------------------------------------------ save and restore


def test_what_is_saved_comes_back(saved, reopen):
    checkpoints = reopen(saved)
    assert checkpoints.steps() == [3, 6]
    assert checkpoints.latest() == 6
    for step, value in ((3, 1.0), (6, 2.0)):
        assert_same(checkpoints.restore(step, shapes_of(make_state())), make_state(value))
        assert checkpoints.meta(step) == META


def test_a_part_of_the_state_is_read_alone(saved, reopen):
    shapes = {"ema": shapes_of(make_state()["ema"])}
    assert_same(reopen(saved, read_only=True).restore(6, shapes), {"ema": make_state(2.0)["ema"]})


def test_save_returns_when_the_arrays_may_be_donated(tmp_path):
    state = make_state(7.0)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, META)
    jax.tree.map(lambda a: a.delete(), state)
    checkpoints.close()
    assert_same(checkpoints.restore(1, shapes_of(make_state())), make_state(7.0))


def test_only_the_newest_are_kept(tmp_path, reopen):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(), META)
    checkpoints.close()
    assert reopen(tmp_path).steps() == [2, 3]


def test_one_mesh_reads_what_another_saved(run_python, tmp_path):
    done = run_python(["-m", "tests.programs.restore_on_meshes", str(tmp_path)], devices=8)
    assert done.returncode == 0


# ------------------------------------------------------------------ beside a run


def test_read_only_creates_and_removes_nothing(saved, reopen):
    unfinished = saved / "checkpoints" / "9.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    before = sorted(saved.rglob("*"))
    assert reopen(saved, read_only=True).steps() == [3, 6]
    assert sorted(saved.rglob("*")) == before

    empty = saved / "no_run"
    assert reopen(empty, read_only=True).steps() == []
    assert not empty.exists()


def test_an_unfinished_save_is_reported_and_ignored(saved, caplog, reopen):
    partly = saved / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "6", partly)
    shutil.rmtree(partly / "meta")
    with caplog.at_level(logging.WARNING, logger="absl"):
        checkpoints = reopen(saved)
    assert "Checkpoint 9 was not finished" in caplog.text
    assert checkpoints.latest() == 6
    checkpoints.save(9, make_state(3.0), META)
    checkpoints.close()
    assert reopen(saved).steps() == [3, 6, 9]


# ------------------------------------------------------------------ what cannot be read


def damage_arrays(folder):
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_arrays(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize("damage", [damage_arrays, remove_arrays])
def test_damaged_arrays_name_the_folder_and_the_way_out(saved, damage, reopen):
    damage(saved / "checkpoints" / "6")
    with pytest.raises(UserError) as error:
        reopen(saved).restore(6, shapes_of(make_state()))
    assert str(saved / "checkpoints" / "6") in str(error.value)
    assert "move that directory away to continue from step 3" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_only_checkpoint_has_another_way_out(saved, reopen):
    shutil.rmtree(saved / "checkpoints" / "3")
    remove_arrays(saved / "checkpoints" / "6")
    with pytest.raises(UserError, match="move that directory away to start again"):
        reopen(saved).restore(6, shapes_of(make_state()))


@pytest.mark.parametrize(
    "content", [None, "{", "[]", json.dumps({k: v for k, v in META.items() if k != "data"})]
)
def test_missing_or_wrong_meta_names_the_folder(saved, content, reopen):
    path = saved / "checkpoints" / "6" / "meta" / "metadata"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="checkpoints/6 cannot be read") as error:
        reopen(saved).meta(6)
    assert "continue from step 3" in str(error.value)


def test_another_shape_is_refused(saved, reopen):
    shapes = shapes_of(make_state())
    kernel = shapes["params"]["kernel"]
    shapes["params"]["kernel"] = jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=kernel.sharding)
    with pytest.raises(UserError, match="checkpoints/6 cannot be read"):
        reopen(saved).restore(6, shapes)


def test_an_array_that_is_not_there_is_refused(saved, reopen):
    shapes = shapes_of(make_state())
    shapes["params"]["gate"] = shapes["params"]["kernel"]
    with pytest.raises(UserError, match="checkpoints/6 cannot be read"):
        reopen(saved).restore(6, shapes)


def noise_state(key):
    """Arrays that fill files of their own: what tensorstore writes in one place has a CRC."""
    noise = jax.random.normal(jax.random.key(key), (2, 64, 64))
    return {"params": {"kernel": noise[0]}, "ema": {"kernel": noise[1]}}


@pytest.fixture(scope="module")
def two_to_damage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for step in (3, 6):
        checkpoints.save(step, noise_state(step), META)
    checkpoints.close()
    return folder


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_flipped_bit_changes_nothing_unseen(two_to_damage, data):
    folder = two_to_damage
    path = data.draw(st.sampled_from(files_of(folder / "checkpoints" / "6")))
    content = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(content)
    flipped[place] ^= 1 << bit
    path.write_bytes(flipped)
    checkpoints = checkpoint.Checkpoints(folder, keep=3, read_only=True)
    try:
        assert checkpoints.meta(6) == META
        assert_same(checkpoints.restore(6, shapes_of(noise_state(6))), noise_state(6))
    except UserError as error:
        assert str(folder / "checkpoints" / "6") in str(error)
        assert "continue from step 3" in str(error)
    finally:
        checkpoints.close()
        path.write_bytes(content)


def test_a_wrong_value_that_orbax_reads_is_named(saved, reopen, monkeypatch):
    reader = checkpoint.Checkpoints._reader

    class Wrong:
        def restore(self, *args, **kwargs):
            found = reader(None).restore(*args, **kwargs)
            found["ema"]["bias"] = found["ema"]["bias"].at[2].add(2**-20)
            return found

    monkeypatch.setattr(checkpoint.Checkpoints, "_reader", lambda self: Wrong())
    with pytest.raises(UserError) as error:
        reopen(saved).restore(6, shapes_of(make_state()))
    assert "checkpoints/6" in str(error.value) and "state/ema/bias is damaged" in str(error.value)
    assert "continue from step 3" in str(error.value)


def test_a_wrong_value_in_the_meta_is_seen(saved, reopen):
    path = saved / "checkpoints" / "6" / "meta" / "metadata"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(UserError, match="checkpoints/6 cannot be read.*checksum"):
        reopen(saved).meta(6)


def test_a_checkpoint_of_an_older_version_has_no_checksums(saved, reopen):
    path = saved / "checkpoints" / "6" / "meta" / "metadata"
    path.write_text(json.dumps(META))
    assert reopen(saved).meta(6) == META
    assert_same(reopen(saved).restore(6, shapes_of(make_state())), make_state(2.0))


# ------------------------------------------------------------------ what cannot be written


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk does: every write beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state():
    noise = jax.random.normal(jax.random.key(0), (4, 2**18))  # 1 MiB each, not compressible
    return {"params": noise[0], "ema": noise[1], "opt_state": {"mu": noise[2], "nu": noise[3]}}


@pytest.mark.parametrize("ask", ["wait", "check", "save", "close"])
def test_a_save_that_fails_in_the_background_stops_the_run(tmp_path, ask):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    checkpoints.save(3, large_state(), META)
    checkpoints.wait()
    with pytest.raises(UserError) as error, files_of_at_most(2**19):
        checkpoints.save(6, large_state(), META)
        if ask == "check":
            for _ in range(500):
                checkpoints.check()
                time.sleep(0.02)
        elif ask == "save":
            checkpoints.save(9, large_state(), META)
        else:
            getattr(checkpoints, ask)()
    assert "could not be written" in str(error.value) and "File too large" in str(error.value)
    assert "the newest whole one is 3" in str(error.value)

    # Where there is room again, the run goes on from there, and nothing of the failed one is used.
    again = checkpoint.Checkpoints(tmp_path, keep=3)
    assert again.steps() == [3]
    again.save(6, large_state(), META)
    again.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6"}


def test_a_step_that_is_not_newer_is_refused(saved, reopen):
    with pytest.raises(UserError, match="checkpoint 5 was not written.* the later 6"):
        reopen(saved).save(5, make_state(), META)


def test_the_ema_is_read_alone(tmp_path, reopen):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    checkpoints.save(3, large_state(), META)
    checkpoints.close()

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])  # of all threads

    checkpoints, shapes = reopen(tmp_path, read_only=True), shapes_of(large_state())
    before = bytes_read()
    found = checkpoints.restore(3, {"ema": shapes["ema"]})
    assert bytes_read() - before < 1.2 * 2**20  # of 4 MiB
    assert_same(found, {"ema": large_state()["ema"]})


# ------------------------------------------------------------------ of another run or other data


@pytest.fixture
def resumable(digits_config, tmp_path):
    """Config, meta data of a checkpoint at step 3 and the data set."""
    dataset = data.open_dataset(digits_config.data)
    position = run.data_position(digits_config, dataset, 3)
    meta = run.checkpoint_meta(digits_config, position, {})
    return digits_config, json.loads(json.dumps(meta)), dataset, tmp_path / "3"


@pytest.fixture
def digits_config():
    config = digits.get_config("small")
    config.optimizer.lr = 1e-3
    return config


def test_the_same_run_resumes(resumable):
    config, meta, dataset, path = resumable
    run.check_resume(config, meta, dataset, path)
    with config.unlocked():
        config.mesh.fsdp = 8  # decides nothing of what is trained
        config.eval.every = 1
    run.check_resume(config, meta, dataset, path)


def test_other_data_is_refused(resumable):
    config, meta, dataset, path = resumable
    meta["data"]["dataset"] = "0123456789abcdef"
    with pytest.raises(UserError) as error:
        run.check_resume(config, meta, dataset, path)
    for part in (str(path), "other data", "0123456789abcdef", dataset.fingerprint, "--workdir"):
        assert part in str(error.value)


def test_another_config_is_refused_by_key(resumable):
    config, meta, dataset, path = resumable
    config.optimizer.lr = 5e-4
    with pytest.raises(UserError, match="optimizer.lr: 0.001 -> 0.0005"):
        run.check_resume(config, meta, dataset, path)


def test_another_batch_size_in_the_position_is_refused(resumable):
    config, meta, dataset, path = resumable
    meta["data"]["next_row"] += 1
    with pytest.raises(UserError, match="contradicts batch_size"):
        run.check_resume(config, meta, dataset, path)
