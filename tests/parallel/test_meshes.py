"""One program on every mesh: the same numbers, a share of the memory, no wasted communication."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from shortcut_jax.planning import flops
from shortcut_jax.planning.collectives import by_kind, collectives

# Optimisation of the machine code takes half of the time and comes after the layout is decided.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"

# ------------------------------------------------------------------ the same numbers

# name -> mesh, by number of devices.
MESHES = {1: {"1x1": "1,1"}, 8: {"8x1": "8,1", "1x8": "1,8", "2x4": "2,4"}}
# More that changes how a step is computed and not what. Alone on one device: tests/test_train.py.
WAYS = {
    1: {"1x1": "1,1;model.depth=2"},
    8: {
        "8x1_accumulated": "8,1;model.depth=2;accumulation_steps=2",
        "1x8_accumulated": "1,8;model.depth=2;accumulation_steps=4",
        "8x1_remat": "8,1;model.depth=2;model.remat='dots'",
        "1x8_scanned": "1,8;model.depth=2;model.scan_layers=True",
        "2x4_all": "2,4;model.depth=2;accumulation_steps=4;model.remat='full';"
        "model.scan_layers=True",
    },
}

# Why not bit for bit: see tests/test_resume.py. Found: 3e-7 at most of the scalars, 1e-7 of the
# parameters, which three steps of lr = 1e-3 move by up to 3e-3.
SCALARS_RTOL = 1e-5
PARAMS_ATOL = 3e-6


def run_program(run_python, program, out, specs, devices):
    """Runs one of tests/programs on so many devices; it writes into `out` for each of `specs`."""
    args = ["-m", f"tests.programs.{program}", str(out)]
    args += [f"{name}={spec}" for name, spec in specs.items()]
    env = {"XLA_FLAGS": FAST_COMPILE.format(devices)}
    assert run_python(args, env=env, timeout=280).returncode == 0


@pytest.fixture(scope="module")
def train_all(run_python, tmp_path_factory):
    """train_all(runs): a folder with what tests/programs/train_on_meshes.py writes for them."""

    def train_all(runs):
        out = tmp_path_factory.mktemp("meshes")
        for devices, specs in runs.items():
            run_program(run_python, "train_on_meshes", out, specs, devices)
        return out

    return train_all


@pytest.fixture(scope="module")
def trained(train_all):
    return train_all(MESHES)


@pytest.fixture(scope="module")
def trained_in_all_ways(train_all):
    return train_all(WAYS)


def read_metrics(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "loss/empirical", "grad_norm", "update_norm", "param_norm")
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def assert_trained_the_same(folder, name):
    expected, found = read_metrics(folder / "1x1"), read_metrics(folder / name)
    assert [line["step"] for line in expected] == [1, 2, 3]
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=SCALARS_RTOL)
    with np.load(folder / "1x1.npz") as a, np.load(folder / f"{name}.npz") as b:
        assert sorted(a.files) == sorted(b.files)
        for key in a.files:
            np.testing.assert_allclose(b[key], a[key], rtol=0, atol=PARAMS_ATOL, err_msg=key)


@pytest.mark.parametrize("mesh", MESHES[8])
def test_every_mesh_trains_the_same(trained, mesh):
    assert_trained_the_same(trained, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[8])
def test_every_way_to_compute_a_step_trains_the_same(trained_in_all_ways, way):
    assert_trained_the_same(trained_in_all_ways, way)


# ------------------------------------------------------------------ a share of the memory


PARTS = ("params/", "ema/", "opt_state/", "averages/ema_0.5/", "averages/power_0.1/")


def shares(trained, mesh):
    """name -> shape, bytes and bytes on each device, of parameters, averages, optimizer state."""
    arrays = json.loads((trained / f"{mesh}.json").read_text())
    return {k: v for k, v in arrays.items() if k.startswith(PARTS)}


def assert_shared(arrays, fsdp):
    for part in PARTS:
        assert any(name.startswith(part) for name in arrays)
    for name, array in arrays.items():
        in_layer = array["shape"][1:] if "/blocks/" in name else array["shape"]
        splits = any(size % fsdp == 0 for size in in_layer)
        expected = array["bytes"] // fsdp if splits else array["bytes"]
        assert array["shards"] == [expected] * 8, name
    total = sum(array["bytes"] for array in arrays.values())
    per_device = sum(array["shards"][0] for array in arrays.values())
    assert 1 <= per_device / total * fsdp < 1.01  # few and small arrays cannot be split


@pytest.mark.parametrize("mesh, fsdp", [("1x8", 8), ("2x4", 4)])
def test_fsdp_gives_each_device_its_part_of_the_state(trained, mesh, fsdp):
    assert_shared(shares(trained, mesh), fsdp)


@pytest.mark.slow
@pytest.mark.parametrize("way, fsdp", [("1x8_scanned", 8), ("2x4_all", 4)])
def test_fsdp_gives_each_device_its_part_of_scanned_layers(trained_in_all_ways, way, fsdp):
    arrays = shares(trained_in_all_ways, way)
    assert any("/blocks/" in name for name in arrays)
    assert_shared(arrays, fsdp)


def test_data_parallel_copies_the_state(trained):
    assert all(a["shards"] == [a["bytes"]] * 8 for a in shares(trained, "8x1").values())


# ------------------------------------------------------------------ no wasted communication

# name -> argument of configs/digits.py and changed keys. All with 8 devices, data-parallel.
STEPS = {
    "random": "objective=shortcut",
    "stratified_guided": "objective=shortcut;objective.cfg_scale=1.5;"
    "objective.step_size_sampling='stratified'",
    "systematic_guided": "objective=shortcut;objective.cfg_scale=1.5;"
    "objective.step_size_sampling='systematic'",
    "flow_matching": "objective=flow_matching",
    "authors_code": "authors_code",
    "accumulated": "objective=shortcut;accumulation_steps=4",
}


@pytest.fixture(scope="module")
def compile_steps(run_python, tmp_path_factory):
    """compile_steps(specs, devices): a folder with what tests/programs/compiled_steps.py writes."""

    def run(specs, devices):
        out = tmp_path_factory.mktemp("compiled")
        run_program(run_python, "compiled_steps", out, specs, devices)
        return out

    return run


@pytest.fixture(scope="module")
def compiled(compile_steps):
    return compile_steps(STEPS, devices=8)


def test_parser_of_compiled_programs_sees_a_gather(compiled):
    found = by_kind(collectives((compiled / "head_of_batch.txt").read_text()))
    assert found.keys() - {"all-reduce"}, "the negative control holds no collective"


@pytest.mark.parametrize("name", STEPS)
def test_data_parallel_step_only_sums_gradients(compiled, name):
    """All-reduce of each gradient once, and of some scalars; nothing else crosses devices."""
    found = by_kind(collectives((compiled / f"{name}.txt").read_text()))
    parameters = json.loads((compiled / f"{name}.json").read_text())["parameters"]
    assert found.keys() == {"all-reduce"}
    scalars = found["all-reduce"][1] - 4 * parameters
    assert 0 <= scalars < 1024


# ------------------------------------------------------------------ no wasted arithmetic


@pytest.mark.parametrize("name", sorted(STEPS.keys() - {"accumulated"}))  # a loop counts once
def test_every_device_has_an_equal_share_of_the_work(compiled, name):
    """Bootstrap rows on one device, or on all, would be as much work as all the rest."""
    found = json.loads((compiled / f"{name}.json").read_text())
    assert 1 < found["flops"] / found["flops_by_formula"] < 1.25  # what is no product counts, too


def test_step_has_the_flops_of_three_forwards_and_two_half_steps(compile_steps):
    """Forward and backward cost 3 forwards per row, the bootstrap 2 more for its rows."""
    size = {"hidden_size": 384, "depth": 2, "num_heads": 6, "patch_size": 1, "mlp_ratio": 4.0}
    spec = ";".join(["", "batch_size=16", *(f"model.{k}={v}" for k, v in size.items())])
    out = compile_steps({"large": spec}, devices=1)
    found = json.loads((out / "large.json").read_text())["flops"]

    row = flops.forward(ConfigDict(size), (8, 8, 1))
    rows, bootstrap_rows = 16, 4
    assert found == pytest.approx(row * (3 * rows + 2 * bootstrap_rows), rel=0.03)
