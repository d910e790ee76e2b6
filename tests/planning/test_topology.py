"""Steps compiled for machines that are not here."""

import dataclasses
import importlib.util
import json
import os

import jax
import pytest

from configs import digits
from shortcut_jax import device_memory, run, state, validation
from shortcut_jax.errors import UserError
from shortcut_jax.planning import topology, topology_table
from tests.sentences import assert_sentence

SMALL = ("-m", "shortcut_jax.main", "--config=configs/digits.py:small", "--dry_run")
FAST = "--xla_backend_optimization_level=0"  # compiles in half the time


@pytest.fixture(scope="module")
def compiled(run_python, tmp_path_factory):
    """What main says of 8 CPU devices, and the report that it keeps, twice the same."""
    file = tmp_path_factory.mktemp("reports") / "topologies.json"
    args = (*SMALL, "--topology=cpu:8", f"--report={file}", "--config.mesh.fsdp=8")
    done = run_python([*args, "--config.mesh.data=1"], env={"XLA_FLAGS": FAST})
    assert done.returncode == 0
    return done.stdout, file


def test_main_compiles_for_devices_that_are_not_there(compiled):
    text, file = compiled
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["topology"], row["devices"], row["fits"]) == ("cpu:8", 8, True)
    assert row["mesh"] == {"data": 1, "fsdp": 8}
    assert (row["network"], row["batch_size"]) == ("DiT 32x1/2", 32)
    # Parameters, EMA and two moments, an eighth of each on a device; 4 + 4 + 1 small ones whole.
    params = run.prepare(digits.get_config("small"), measures=False)
    whole = 4 * 4 * count(params)
    assert whole / 8 < row["state"] < 1.05 * whole / 8 + 4096
    # Beside the state, activations: the MLP of one row has 16 tokens of 128 units.
    assert (
        row["peak"] > row["state"] + 4 * 4 * 16 * 128
        and row["flops"] > 1e6
        and row["bytes_accessed"] > 1e5
    )
    assert row["collectives"]["all-gather"][1] > 0
    assert row["hbm"] is None and row["largest_batch"] is None
    for words in ("cpu:8, 8 devices", "{'data': 1, 'fsdp': 8}", "32, 4 per device", "all-gather"):
        assert words in text


def count(setup):
    shapes = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    return state.count(shapes)


def test_a_report_replaces_that_of_the_same_step(compiled, tmp_path):
    _, file = compiled
    (row,) = json.loads(file.read_text())["rows"]
    path = tmp_path / "rows.json"
    first = topology.Report(**row)
    for report in (
        first,
        dataclasses.replace(first, seconds=9.0),
        dataclasses.replace(first, batch_size=64),
    ):
        topology_table.add(path, report)
    rows = json.loads(path.read_text())["rows"]
    assert [(r["batch_size"], r["seconds"]) for r in rows] == [(32, 9.0), (64, row["seconds"])]
    text = topology_table.table(rows)
    assert text.count("\n") == 4 and "| DiT 32x1/2 | cpu:8 | 8 | 1 x 8 | 64 | no | none |" in text


def test_a_step_may_fit_but_not_beside_the_copy_of_a_save(compiled):
    _, file = compiled
    (row,) = json.loads(file.read_text())["rows"]
    assert row["copy"] == row["state"]
    for room, verdict, cell in (
        (0, "fits", "yes"),
        (-1, "--config.checkpoint.copy=host", "copy=host"),
    ):
        report = topology.Report(**row | {"hbm": row["peak"] + row["copy"] + room})
        assert report.text().endswith(verdict)
        assert f"| {cell} |" in topology_table.table([dataclasses.asdict(report)])


@pytest.mark.usefixtures("quick_compile")
def test_scanned_layers_count_as_often_as_they_run():
    """XLA counts a loop's body once; what is reported is the cost of the unrolled step."""
    config = digits.get_config("small,objective=flow_matching")  # compiles in half of the time
    config.model.depth = 3
    unrolled = topology.compile_for(config, topology.find_machine("cpu:1"))
    config.model.scan_layers = True
    scanned = topology.compile_for(config, topology.find_machine("cpu:1"))
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.02)
    assert scanned.bytes_accessed == pytest.approx(unrolled.bytes_accessed, rel=0.1)


# ------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:16", "v4-32", "tpu:8", "cpu", "cpu:0", "cpu:x", "v9:2x2", "0*v5e:4x4"]
)
def test_no_machine_of_that_name(name):
    with pytest.raises(UserError) as caught:
        topology.find_machine(name)
    expected = [f"--topology={name} is no machine", "cpu:N", "v5p", "v4:2x2x4", "use one"]
    assert_sentence(str(caught.value), expected)


def test_more_cpu_devices_than_this_process_can_make():
    jax.devices()
    with pytest.raises(UserError) as caught:
        topology.find_machine("cpu:64")
    assert_sentence(str(caught.value), ["--topology=cpu:64", "XLA_FLAGS", "leave"])


def test_without_libtpu_the_extra_is_named(monkeypatch):
    def absent(**kwargs):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(UserError) as caught:
        topology.find_machine("v5e:4x4")
    assert_sentence(str(caught.value), ["v5e:4x4 needs libtpu", "pip install -e '.[tpu]'"])


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ([*SMALL[:-1], "--topology=cpu:8"], ["--topology=cpu:8", "--dry_run", "add that"]),
        ([*SMALL, "--report=a.json"], ["--report=a.json", "--topology", "leave out --report"]),
    ],
    ids=["dry_run", "topology"],
)
def test_flags_that_go_together(run_python, args, fragments):
    done = run_python([*args, "--workdir=runs/x"])
    assert done.returncode == 2
    assert_sentence(done.stderr.splitlines()[-1], fragments)


def test_a_mesh_stays_within_slices():
    config = digits.get_config("small")
    config.batch_size = config.eval.batch_size = 64
    assert validation.check_devices(config, 16, num_slices=2) == (16, 1)
    config.mesh.update(data=1, fsdp=16)
    with pytest.raises(UserError) as caught:
        validation.check_devices(config, 16, num_slices=2)
    assert_sentence(str(caught.value), ["mesh.data=1", "2 slices", "at most 8", "lower it"])


# ------------------------------------------------------------------ reading the compiler


@pytest.mark.parametrize(
    ("refusal", "gib"),
    [
        ("Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded", 20.1),
        ("required for HLO temporaries (400.00G) exceeds available HBM (15.48G).", 400),
        ("Used 1.50T of 95.74G hbm.", 1536),
        ("out of something else", None),
    ],
)
def test_bytes_that_a_program_needs(refusal, gib):
    assert device_memory.needed(refusal) == (gib and gib * device_memory.GIB)


def test_the_largest_batch_is_a_valid_one_that_fits():
    config = digits.get_config("small")  # batch 32; groups of 4 rows on each of 8 devices
    find = device_memory.largest_batch
    assert find(config, 8, hbm=1000, state=200, peak=300) == 32 * 8
    assert find(config, 8, hbm=999, state=200, peak=300) == 32 * 7  # not 255 rows
    assert find(config, 8, hbm=200, state=200, peak=300) == 0
    assert find(config, 8, hbm=None, state=200, peak=300) is None
    assert find(config, 8, hbm=1000, state=200, peak=None) is None


@pytest.mark.slow
def test_memory_is_traded_for_time(run_python, tmp_path):
    file = tmp_path / "rows.json"
    args = [*SMALL, "--topology=cpu:1", f"--report={file}", "--config.batch_size=256"]
    args += ["--config.model.depth=4", "--config.model.hidden_size=64"]
    keys = ([], ["model.remat=dots"], ["model.remat=full"], ["accumulation_steps=4"])
    for key in keys:
        flags = [f"--config.{k}" for k in key]
        assert run_python([*args, *flags], env={"XLA_FLAGS": FAST}).returncode == 0
    plain, dots, full, parts = json.loads(file.read_text())["rows"]
    assert full["peak"] < dots["peak"] < 0.7 * plain["peak"]
    assert plain["flops"] < dots["flops"] < full["flops"] < 1.4 * plain["flops"]
    assert parts["peak"] < 0.5 * plain["peak"]


# ------------------------------------------------------------------ TPUs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[tpu]'"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "2*v5e:2x2", "v4:2x2x1"])
def test_a_step_compiles_for_tpus(run_python, tmp_path, name):
    file = tmp_path / "rows.json"
    args = (*SMALL, f"--topology={name}", f"--report={file}", "--config.model.scan_layers=True")
    assert run_python([*args, "--config.accumulation_steps=2"], timeout=280).returncode == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["devices"] == (8 if name.startswith("2*") else 4)
    assert "TPU" in row["device"] and row["fits"]
    # Across slices the compiler reduces in stages and gathers the result.
    stages = {"all-gather"} if name.startswith("2*") else set()
    assert row["collectives"].keys() == {"all-reduce", *stages}
    # The largest batch would fill the memory, which one row of this network is nothing of.
    assert row["largest_batch"] > 1000 and row["hbm"] > 10 * device_memory.GIB


@pytest.mark.slow
@needs_libtpu
def test_names_that_libtpu_refuses(run_python):
    done = run_python([*SMALL, "--topology=v5e:3x5"])
    assert done.returncode == 2
    assert_sentence(done.stderr.splitlines()[-1], ["v5e:3x5", "whole hosts", "use one"])
