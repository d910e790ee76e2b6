"""A run that was killed and started again is the run that never stopped."""

import functools
import json
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

PROGRAM = "tests.programs.recorded_main"

# Checkpoint 4 lies within a logging interval (3..6) and within an epoch; batch 7 crosses into the
# next one (1797 rows). The process dies at step 7: after the log line and the snapshot of step 6,
# before save 8.
TOTAL, SAVED, KILLED = 12, 4, 7
FLAGS = (
    "--config=configs/digits.py:small",
    f"--config.total_steps={TOTAL}",
    "--config.batch_size=256",
    "--config.optimizer.lr=1e-3",
    "--config.checkpoint.every=4",
    "--config.log.every=3",
    "--config.log.tensorboard=False",
    "--config.averages.rates=(0.9,)",
    "--config.averages.power=(0.05,0.1)",
    "--config.averages.snapshot_every=3",
    "--config.eval.every=0",  # tests/test_entry_points.py evaluates
    "--config.optimizer.lr=1e-3",
)
MESHES = {  # name -> devices, flags
    "one_device": (1, ()),
    "data_parallel": (8, ("--config.mesh.data=8",)),
    "fully_sharded": (8, ("--config.mesh.data=1", "--config.mesh.fsdp=8")),
}
# Another mesh of as many devices takes the same code.
QUICKLY = ("one_device", pytest.param("data_parallel", marks=pytest.mark.slow), "fully_sharded")
# Half of the time to compile; what is added to what in which order does not change.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"

CLOCK = ("seconds/", "fraction/", "core_hours", "steps_per_", "images_per_", "eta_seconds")


class Runs:
    """Runs of one config, each made once."""

    def __init__(self, run_python, root):
        self._run_python = run_python
        self._root = root

    def start(self, workdir, mesh, expect=0, **env):
        """Starts the same command whatever `env` says about dying; returns its log."""
        devices, flags = MESHES[mesh]
        args = ["-m", PROGRAM, f"--workdir={workdir}", *FLAGS, *flags]
        env |= {"XLA_FLAGS": FAST_COMPILE.format(devices)}
        done = self._run_python(args, env=env, timeout=280)
        assert done.returncode == expect
        return done.stderr

    @functools.cache  # noqa: B019 - lives as long as the fixture
    def uninterrupted(self, mesh):
        workdir = self._root / f"{mesh}_uninterrupted"
        self.start(workdir, mesh)
        return workdir

    @functools.cache  # noqa: B019
    def resumed(self, mesh):
        """Workdir, the lines that the killed process left behind, and the log of the second."""
        workdir = self._root / f"{mesh}_resumed"
        self.start(workdir, mesh, expect=-signal.SIGKILL, KILL_AT_STEP=str(KILLED))
        assert finished_checkpoints(workdir) == [SAVED]
        left = read_lines(workdir / "metrics.jsonl"), read_batches(workdir)
        (workdir / "batches.txt").unlink()
        return workdir, left, self.start(workdir, mesh)

    def copy_at(self, step, mesh, name):
        """A copy of a run in which `step` is the last checkpoint, as if killed soon after."""
        workdir = self._root / name
        shutil.copytree(self.uninterrupted(mesh), workdir)
        for later in finished_checkpoints(workdir):
            if later > step:
                shutil.rmtree(workdir / "checkpoints" / str(later))
        return workdir


@pytest.fixture(scope="module")
def runs(run_python, tmp_path_factory):
    return Runs(run_python, tmp_path_factory.mktemp("resume"))


def finished_checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def read_lines(path):
    """Records of a JSON lines file without the fields that a clock gave."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(CLOCK)} for record in records]


def read_batches(workdir):
    """[(step, hash)] in the order in which batches were taken."""
    lines = (workdir / "batches.txt").read_text().splitlines()
    return [(int(step), digest) for step, digest in map(str.split, lines)]


def read_state(workdir, step, folder="checkpoints"):
    """Every array of a checkpoint as numpy, by path; independent of how the run reads it."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    path = workdir / folder / str(step) / "state"
    arrays = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(a) for p, a in leaves}


def read_meta(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert different == []


# ------------------------------------------------------------------ killed between checkpoints


@pytest.mark.parametrize("mesh", QUICKLY)
def test_state_is_bit_identical(runs, mesh):
    one = read_state(runs.uninterrupted(mesh), TOTAL)
    workdir, _, log = runs.resumed(mesh)
    assert f"Resumed from step {SAVED}" in log
    assert_same_arrays(one, read_state(workdir, TOTAL))
    assert one["step"] == TOTAL
    averages = [f"averages/{name}/" for name in ("ema_0.9", "power_0.05", "power_0.1")]
    for part in ("params/", "ema/", "opt_state/", "metrics/", *averages):
        assert any(name.startswith(part) for name in one)
    # A run that does not train would pass all of the above.
    before = read_state(workdir, SAVED)
    still = {name for name in one if np.array_equal(one[name], before[name])}
    assert not any(name.startswith(("params/", "ema/", "averages/")) for name in still)


@pytest.mark.parametrize("mesh", QUICKLY)
def test_snapshots_are_bit_identical(runs, mesh):
    """None is lost or doubled, though the killed process had one that is later than its save."""
    one, (workdir, _, log) = runs.uninterrupted(mesh), runs.resumed(mesh)
    assert "Dropped the snapshots [6]" in log
    for step in (3, 6, 9, 12):
        found = read_state(workdir, step, "snapshots")
        assert_same_arrays(read_state(one, step, "snapshots"), found)
        parts = {name.split("/")[1] for name in found}
        assert parts == {"power_0.05", "power_0.1"}
    for run in (one, workdir):
        assert {p.name for p in (run / "snapshots").iterdir()} == {"3", "6", "9", "12"}
    last = read_state(workdir, TOTAL)  # of step 12, as the snapshot
    assert_same_arrays({name: last[name] for name in found}, found)


@pytest.mark.parametrize("mesh", QUICKLY)
def test_metrics_are_identical(runs, mesh):
    expected = read_lines(runs.uninterrupted(mesh) / "metrics.jsonl")
    workdir, (left, _), _ = runs.resumed(mesh)
    assert left[-1]["step"] > SAVED  # the killed process had logged a step that is done again
    assert left == expected[: len(left)]
    assert read_lines(workdir / "metrics.jsonl") == expected
    assert [line["step"] for line in expected] == [3, 6, 9, 12]


@pytest.mark.parametrize("mesh", QUICKLY)
def test_batches_are_those_of_the_uninterrupted_run(runs, mesh):
    expected = read_batches(runs.uninterrupted(mesh))
    workdir, (_, left), _ = runs.resumed(mesh)
    assert [step for step, _ in expected] == list(range(TOTAL))
    assert len({digest for _, digest in expected}) == TOTAL
    assert left == expected[:KILLED]
    assert read_batches(workdir) == expected[SAVED:]


def test_data_position_and_clock_continue(runs):
    uninterrupted, (resumed, _, _) = runs.uninterrupted("one_device"), runs.resumed("one_device")
    a, b = read_meta(uninterrupted, TOTAL), read_meta(resumed, TOTAL)
    assert a["data"] == b["data"]
    assert (a["data"]["next_step"], a["data"]["next_row"], a["data"]["epoch"]) == (12, 12 * 256, 1)
    assert a["config"] == b["config"]
    # The time of the first process, up to the save, is part of the total.
    earlier = read_meta(resumed, SAVED)["clock"]
    assert b["clock"]["seconds/compile"] > earlier["seconds/compile"] > 0
    assert b["clock"]["device_seconds"] > earlier["device_seconds"] > 0
    for workdir in (uninterrupted, resumed):
        assert json.loads((workdir / "finished.json").read_text()) == {"step": TOTAL}


# ------------------------------------------------------------------ killed while saving


def test_killed_while_saving_uses_the_previous_checkpoint(runs, tmp_path):
    runs.start(tmp_path, "one_device", expect=-signal.SIGKILL, KILL_IN_SAVE="8")
    assert finished_checkpoints(tmp_path) == [4]
    unfinished = [p.name for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]
    assert len(unfinished) == 1 and unfinished[0].startswith("8.orbax-checkpoint-tmp")

    log = runs.start(tmp_path, "one_device")
    assert "Checkpoint 8 was not finished" in log
    assert "Resumed from step 4" in log
    assert_same_arrays(
        read_state(runs.uninterrupted("one_device"), TOTAL), read_state(tmp_path, TOTAL)
    )
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "12"}


# ------------------------------------------------------------------ saved and read on other meshes

# Another mesh sums the same numbers in another order: the loss and each gradient are sums over
# rows, which every device forms for its own rows before the partial sums are added, and float32
# addition is not associative. One step differs by about 1e-7 relative; AdamW divides by the root
# of the second moment, which turns that into the same share of a whole update where gradients are
# near zero.
METRICS_RTOL = 1e-5
PARAMS_ATOL = 1e-5  # 12 steps move them by 1e-2


def test_each_mesh_resumes_what_another_saved(runs):
    workdir = runs.copy_at(4, "data_parallel", "elastic")
    log = runs.start(workdir, "fully_sharded", expect=-signal.SIGKILL, KILL_AT_STEP="11")
    assert "Resumed from step 4" in log
    assert_same_arrays(  # what is read is exactly what was written, whatever the mesh
        read_state(workdir, 4), read_state(runs.uninterrupted("data_parallel"), 4)
    )
    assert "Resumed from step 8" in runs.start(workdir, "one_device")

    expected = runs.uninterrupted("one_device")
    a, b = read_state(expected, TOTAL), read_state(workdir, TOTAL)
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith(("params/", "ema/", "averages/")):
            np.testing.assert_allclose(b[name], a[name], rtol=0, atol=PARAMS_ATOL, err_msg=name)
    lines = (read_lines(w / "metrics.jsonl") for w in (workdir, expected))
    for found, wanted in zip(*lines, strict=True):
        assert found == pytest.approx(wanted, rel=METRICS_RTOL), wanted["step"]
    taken = read_batches(workdir)[TOTAL:]  # after those of the run that was copied
    assert taken == read_batches(expected)[4:11] + read_batches(expected)[8:]
