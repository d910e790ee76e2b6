"""Processes find each other, agree and end; whatever is missing or different is one sentence."""

import signal
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from shortcut_jax import checkpoint
from shortcut_jax.errors import UserError
from shortcut_jax.parallel import distributed, distributed_flag, sharding
from tests.processes import free_port, start_all
from tests.programs.restore_on_meshes import make_state, place
from tests.sentences import assert_sentence

SMALL = "--config=configs/digits.py:small"
NOTHING = dict.fromkeys(distributed_flag.VARIABLES)


def error_of(status, stderr):
    assert status == 2, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr
    return line


def slurm(index, count, port):
    """What srun tells a task."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


# ------------------------------------------------------------------ real processes


def test_tasks_of_a_slurm_job_are_one_run(tmp_path):
    program, port = ["-m", "tests.programs.several", str(tmp_path), SMALL], free_port()
    ends = start_all([(program, slurm(i, 2, port)) for i in range(2)], devices=2)
    for index, (status, stderr) in enumerate(ends):
        assert status == 75, stderr  # EX_TEMPFAIL: start again
        assert f"Process {index}: 2 of 2 processes are here, with 2 + 2 = 4 devices" in stderr
        assert "preempted: asked to leave at step" in stderr and "Traceback" not in stderr
    left = {(tmp_path / f"left_{index}").read_text() for index in range(2)}
    assert len(left) == 1 and int(left.pop()) > 3

    # What 2 x 2 devices saved is read by one process on one device, whole and the EMA alone.
    shapes = jax.eval_shape(make_state)
    shapes = checkpoint.with_shardings(shapes, place(sharding.make_mesh(1, 1)))
    saved = checkpoint.Checkpoints(tmp_path, keep=1, read_only=True)
    for names in (["params", "ema"], ["ema"]):
        found = saved.restore(3, {name: shapes[name] for name in names})
        expected = {name: make_state()[name] for name in names}
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert saved.meta(3)["data"] == {"next_step": 3}


def end_at_different_times(out, how):
    program, port = ["-m", "tests.programs.done_early", str(out), how, SMALL], free_port()
    ends = start_all([(program, slurm(i, 2, port)) for i in range(2)], timeout=200)
    return [status for status, _ in ends], (out / "waited").exists()


def test_none_ends_before_all_are_done(tmp_path):
    assert end_at_different_times(tmp_path, "ends") == ([0, 0], True)


@pytest.mark.slow
def test_one_that_fails_late_lets_those_that_are_done_end_well(tmp_path):
    assert end_at_different_times(tmp_path, "fails") == ([0, 2], True)


@pytest.mark.slow
def test_one_that_dies_late_is_not_waited_for(tmp_path):
    (status, killed), _ = end_at_different_times(tmp_path, "dies")
    assert killed == -signal.SIGKILL and status in (1, -signal.SIGABRT)


@pytest.mark.slow
def test_a_process_with_another_config_ends_all(tmp_path):
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--init_timeout=60"]
    program = ["-m", "shortcut_jax.main", SMALL, f"--workdir={tmp_path / 'run'}", *flags]
    ends = start_all(
        [
            (program, {"JAX_PROCESS_ID": "0"}),
            ([*program, "--config.seed=7"], {"JAX_PROCESS_ID": "1"}),
        ]
    )
    for end in ends:
        assert_sentence(error_of(*end), ["process 1", "config.seed: 7 there and 0 on process 0"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_missed_is_named(tmp_path):
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=3", "--init_timeout=3"]
    program = ["-m", "shortcut_jax.eval", SMALL, f"--workdir={tmp_path}", *flags]
    for end in start_all([([*program, f"--process_id={i}"], {}) for i in (0, 2)]):
        assert_sentence(error_of(*end), ["process 1 did not come", "within 3 s"])


def test_one_worker_alone_ends(tmp_path):
    program = ["-m", "shortcut_jax.main", SMALL, f"--workdir={tmp_path}", "--init_timeout=2"]
    ((status, stderr),) = start_all([(program, slurm(1, 2, free_port()))])
    assert_sentence(error_of(status, stderr), ["did not come within 2 s", "--num_processes=1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platforms", "fragments"),
    [
        ("", ["no accelerator", "would compute on its CPU", "JAX_PLATFORMS=cpu on all"]),
        ("cuda", ["cannot be used (JAX_PLATFORMS=cuda: ", "mend the driver"]),
    ],
)
def test_processes_without_accelerators_end(tmp_path, platforms, fragments):
    program, port = ["-m", "tests.programs.done_early", str(tmp_path), "ends", SMALL], free_port()
    environs = [slurm(i, 2, port) | {"JAX_PLATFORMS": platforms} for i in range(2)]
    for end in start_all([(program, environ) for environ in environs]):
        assert_sentence(error_of(*end), fragments)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="run where there is no GPU")
def test_a_platform_that_is_not_there_is_one_sentence(run_python, tmp_path):
    args = ["-m", "shortcut_jax.main", SMALL, f"--workdir={tmp_path / 'run'}"]
    done = run_python(args, env={"JAX_PLATFORMS": "cuda"})
    fragments = ["JAX_PLATFORMS=cuda", "there is none", ".[cuda]", "set JAX_PLATFORMS=cpu"]
    assert_sentence(error_of(done.returncode, done.stderr), fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("the driver is too old")])
@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu", ""])
def test_only_what_devices_are_to_blame_for_is_said_of_them(monkeypatch, platforms, error):
    def fail():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(type(error)), distributed.devices_named():
        fail()  # with devices
    monkeypatch.setattr(jax, "devices", fail)
    expected = UserError if platforms else type(error)
    with pytest.raises(expected) as found, distributed.devices_named():
        jax.devices()
    if platforms:
        reason = str(error) or "there is none"
        assert_sentence(str(found.value), [f"JAX_PLATFORMS={platforms} ", f"({reason})"])
    with pytest.raises(OSError, match="disk"), distributed.devices_named():
        raise OSError("disk")


# ------------------------------------------------------------------ what is said where


def test_nothing_said_is_a_plain_process():
    assert distributed_flag.read_place(NOTHING, {}) == (None, False)
    assert distributed_flag.read_place({**NOTHING, "num_processes": 1}, {}) == (None, True)
    assert not distributed.several()
    assert distributed.gather({"a": (1,)}) == [{"a": [1]}]
    distributed.agree({"a": 1})
    with pytest.raises(UserError, match="mine"), distributed.together():
        raise UserError("mine")


def test_flags_come_before_variables():
    said = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
    place, _ = distributed_flag.read_place({**NOTHING, "process_id": 2}, said)
    assert place == distributed.Place("b:2", 3, 2)


@pytest.mark.parametrize(
    ("given", "said", "fragments"),
    [
        ({"num_processes": 2}, {}, ["--num_processes=2", "--coordinator and --process_id"]),
        ({"coordinator": "a:1"}, {"JAX_NUM_PROCESSES": "2"}, ["without --process_id"]),
        ({}, {"JAX_NUM_PROCESSES": "two"}, ["JAX_NUM_PROCESSES=two", "number"]),
    ],
)
def test_half_a_place_is_refused(given, said, fragments):
    with pytest.raises(UserError) as error:
        distributed_flag.read_place({**NOTHING, **given}, said)
    assert_sentence(str(error.value), fragments)


KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        (slurm(0, 2, 1), True),
        (slurm(0, 1, 1), False),  # one task: jax.distributed would hide all GPUs but one
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # a batch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (KUBERNETES, False),  # any pod
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_when_jax_distributed_is_asked(environ, expected, tmp_path):
    assert distributed.launched_with_others(environ, dev=tmp_path) == expected


def test_a_tpu_vm_is_asked_for_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not distributed.launched_with_others({}, dev=tmp_path)
    (tmp_path / "accel0").touch()
    assert distributed.launched_with_others({}, dev=tmp_path)


def test_gpus_of_a_slurm_task():
    one_per_node = {**slurm(0, 2, 1), "SLURM_STEP_NUM_NODES": "2"}
    assert distributed.slurm_devices({}) is None
    assert distributed.slurm_devices(slurm(0, 2, 1)) is None  # a CPU job
    assert distributed.slurm_devices({**slurm(0, 2, 1), "CUDA_VISIBLE_DEVICES": "0,1"}) is None
    assert distributed.slurm_devices({**slurm(1, 2, 1), "CUDA_VISIBLE_DEVICES": "3"}) == [0]
    assert distributed.slurm_devices({**one_per_node, "CUDA_VISIBLE_DEVICES": "0,1,2"}) == [0, 1, 2]


@pytest.mark.parametrize("platforms", ["", "cuda,cpu", "tpu"])
def test_a_run_does_not_fall_back_to_the_cpu(platforms, monkeypatch):
    assert distributed._devices() == jax.devices()  # JAX_PLATFORMS=cpu says so
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(UserError) as error:
        distributed._devices()
    assert_sentence(str(error.value), [f"JAX_PLATFORMS={platforms})", "JAX_PLATFORMS=cpu"])
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    assert len(distributed._devices()) == 1


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nit"), AssertionError()])
def test_devices_that_do_not_work(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError) as refused:
        distributed._devices()
    said = " ".join(str(error).split()) or "there is none"
    assert_sentence(str(refused.value), [f"(JAX_PLATFORMS=cpu: {said})", "mend the driver"])


def test_a_deadline_ends_what_cannot_be_interrupted(run_python):
    code = (
        "import time; from shortcut_jax.parallel import distributed\n"
        "with distributed.deadline(5, 'never.'): pass\n"
        "with distributed.deadline(0.1, 'it took too long.'): time.sleep(30)"
    )
    done = run_python(["-c", code], timeout=25)
    assert (done.returncode, done.stderr) == (2, "error: it took too long.\n")


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SEE_SECONDS", 0)
    (tmp_path / "config.json").touch()
    distributed.check_shared(tmp_path, "config.json")
    with pytest.raises(UserError) as error:
        distributed.check_shared(tmp_path / "local", "config.json")
    assert_sentence(str(error.value), [str(tmp_path / "local"), "is not shared", "config.json"])
