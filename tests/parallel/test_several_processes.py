"""One run on 1, 2 and 4 processes, and passed from one number to another: minutes."""

import functools
import json
import shutil

import numpy as np
import pytest

from tests.processes import free_port, start_all
from tests.test_resume import (
    METRICS_RTOL,
    PARAMS_ATOL,
    assert_same_arrays,
    finished_checkpoints,
    read_lines,
    read_meta,
    read_state,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLAGS = ["--config=configs/digits.py:small", "--config.log.tensorboard=False"]
# processes x devices of each
SHAPES = {"1x1": (1, 1), "1x4": (1, 4), "2x2": (2, 2), "4x1": (4, 1), "2x4": (2, 4)}
WAIT = 900  # seconds; a minute on an idle machine


def start(shape, module, workdir, *flags, env=None):
    """Runs a binary on (processes, devices of each); returns [(status, stderr)].

    env: variables of process 1.
    """
    count, devices = SHAPES[shape]
    place = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    program = ["-m", module, f"--workdir={workdir}", *FLAGS, *flags, *place]
    commands = [
        ([*program, f"--process_id={i}", "--init_timeout=200"], env if env and i == 1 else {})
        for i in range(count)
    ]
    return start_all(commands, devices, WAIT)


def succeed(*args):
    ends = start(*args)
    assert [status for status, _ in ends] == [0] * len(ends), ends[0][1]
    return ends[0][1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(shape, *flags): workdir of 8 steps with evaluations, made once."""
    root = tmp_path_factory.mktemp("trained")

    @functools.cache
    def train(shape, *flags):
        workdir = root / "_".join([shape, *flags]).replace("--config.", "")
        succeed(shape, "shortcut_jax.main", workdir, *flags)
        return workdir

    return train


def assert_close(a, b, step):
    """The same run up to the order in which devices of other processes add."""
    a_state, b_state = read_state(a, step), read_state(b, step)
    assert a_state.keys() == b_state.keys()
    for name in a_state:
        if name.startswith(("params/", "ema/")):
            a_value, b_value = (_decided(name, state[name]) for state in (a_state, b_state))
            np.testing.assert_allclose(a_value, b_value, rtol=0, atol=PARAMS_ATOL, err_msg=name)


def _decided(name, value):
    """A parameter without what the loss does not depend on, whose gradient is rounding alone.

    That is the bias of the keys: no softmax changes with it, but Adam makes whole steps of it.
    """
    if not name.endswith("qkv/bias"):
        return value
    queries, _, values = np.split(value, 3, axis=-1)
    return np.concatenate([queries, values], axis=-1)


@pytest.mark.parametrize("shape", ["2x2", "4x1"])
def test_training_does_not_depend_on_processes(trained, shape):
    one, several = trained("1x4"), trained(shape)
    for step in (4, 8):
        assert_close(one, several, step)
        assert read_meta(one, step)["data"] == read_meta(several, step)["data"]
    for found, wanted in zip(
        read_lines(several / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True
    ):
        assert found == pytest.approx(wanted, rel=METRICS_RTOL)
    assert {p.name for p in several.iterdir()} == {p.name for p in one.iterdir()}
    for step in (4, 8):  # among several processes, not a bit
        assert_same_arrays(read_state(trained("2x2"), step), read_state(several, step))


@pytest.mark.parametrize("data, fsdp", [(8, 1), (1, 8), (2, 4)])
def test_two_processes_of_four_devices_train_as_one_device(trained, data, fsdp):
    mesh = (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}")
    several = trained("2x4", *mesh)
    for step in (4, 8):
        assert_close(trained("1x1"), several, step)
    for found, wanted in zip(
        read_lines(several / "metrics.jsonl"),
        read_lines(trained("1x1") / "metrics.jsonl"),
        strict=True,
    ):
        assert found == pytest.approx(wanted, rel=METRICS_RTOL)


def test_evaluation_does_not_depend_on_processes(trained, tmp_path):
    found = {}
    for shape in ("1x4", "2x2", "4x1"):
        workdir = tmp_path / shape
        shutil.copytree(trained("1x4"), workdir)
        (workdir / "eval" / "results.jsonl").unlink()
        succeed(shape, "shortcut_jax.eval", workdir, f"--save_samples={workdir}/samples.npz")
        records = read_lines(workdir / "eval" / "results.jsonl")
        for record in records:
            del record["commit"]  # the tree may be edited while minutes pass
        samples = [(workdir / f"samples_{n}.npz").read_bytes() for n in (1, 4)]
        found[shape] = records, samples
    assert found["1x4"] == found["2x2"] == found["4x1"]


def test_a_run_goes_on_with_fewer_processes(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained("2x2"), workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    (workdir / "finished.json").unlink()
    assert "Resumed from step 4" in succeed("1x4", "shortcut_jax.main", workdir)
    assert_close(workdir, trained("2x2"), 8)
    assert "Resumed from step 8" in succeed(
        "1x1", "shortcut_jax.main", workdir, "--config.total_steps=12"
    )
    assert read_meta(workdir, 12)["data"]["next_row"] == 12 * 32
    assert json.loads((workdir / "finished.json").read_text()) == {"step": 12}


def test_when_one_process_is_killed_all_end_and_go_on(tmp_path):
    program = "tests.programs.killed_main"
    flags = ("--config.total_steps=40", "--config.checkpoint.every=5", "--config.eval.every=0")
    (_, first), (killed, _) = ends = start(
        "2x2",
        program,
        tmp_path,
        *flags,
        env={"KILL": "train:33:0"},  # two arrays for a step
    )
    assert killed == -9 and ends[0][0] not in (0, 2), first
    kept = finished_checkpoints(tmp_path)
    assert kept and max(kept) in (10, 15)
    assert f"Resumed from step {max(kept)}" in succeed("2x2", program, tmp_path, *flags)
    assert max(finished_checkpoints(tmp_path)) == 40
