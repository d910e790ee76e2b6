"""The two commands a user types, as processes: what they print, write and return."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import data, run, state, train, validation
from shortcut_jax.data.sources import Dataset

SMALL = "--config=configs/digits.py:small"


@pytest.fixture(scope="module")
def fresh(run_python, tmp_path_factory):
    """Workdir and process of a run from scratch, 8 steps with evaluations at 4 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "deep" / "digits"
    return workdir, run_python(["-m", "shortcut_jax.main", SMALL, f"--workdir={workdir}"])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder):
    """Path and content of every file, to see that nothing was touched."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_of(done):
    """The one sentence in which a command refused what a user asked for."""
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    return lines[0]


# ------------------------------------------------------------------ main


def test_a_fresh_run_writes_everything(fresh):
    workdir, done = fresh
    assert done.returncode == 0
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "eval", "tensorboard", "finished.json",
    }  # fmt: skip
    flat = config_lib.flatten(digits.get_config("small"))
    assert json.loads((workdir / "config.json").read_text()) == flat
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "eval/fd_digits/1_steps" in line] == [4, 8]
    for step in ("4", "8"):
        pictures = {path.name for path in (workdir / "eval" / step).iterdir()}
        assert pictures == {"samples.png", "curve.png"}
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "finished.json").read_text()) == {"step": 8}


def test_the_log_says_what_runs(fresh):
    log = fresh[1].stderr
    for part in ("Total: 40,228", "Compiled the step", "step 8/8 (100%)", "fd_digits at step 8"):
        assert part in log
    assert "Resumed" not in log


def test_the_same_command_resumes(fresh, run_python, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(fresh[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")  # as after a kill before it was written
    (workdir / "finished.json").unlink()
    done = run_python(["-m", "shortcut_jax.main", SMALL, f"--workdir={workdir}"])
    assert done.returncode == 0
    assert (
        "Resumed from step 4" in done.stderr and "Dropped 3 lines of metrics.jsonl" in done.stderr
    )
    before, after = (read_lines(w / "metrics.jsonl") for w in (fresh[0], workdir))
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[-1] == before[-1]  # the evaluation of step 8
    assert results(workdir) == results(fresh[0])
    assert json.loads((workdir / "finished.json").read_text()) == {"step": 8}


def test_a_finished_run_started_again_changes_nothing(fresh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(fresh[0], workdir)
    assert train.train(digits.get_config("small"), workdir).step == 8
    for name in ("metrics.jsonl", "config.json", "eval/results.jsonl"):
        assert (workdir / name).read_bytes() == (fresh[0] / name).read_bytes()
    assert run.finished_step(workdir) == 8


def test_a_finished_run_that_goes_on_is_not_finished(fresh, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(fresh[0], workdir)
    config = digits.get_config("small")
    config.total_steps = 12
    run.record_config(config, workdir)
    assert run.finished_step(workdir) is None


def test_dry_run_prints_and_writes_nothing(run_python, tmp_path):
    workdir = tmp_path / "run"
    flags = [SMALL, f"--workdir={workdir}", "--dry_run", "--config.batch_size=128"]
    flags += ["--config.objective.bootstrap_fraction=0.125", "--config.mesh.fsdp=2"]
    done = run_python(["-m", "shortcut_jax.main", *flags], devices=8)
    assert done.returncode == 0
    assert not workdir.exists()
    printed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert {
        "objective.bootstrap_fraction = 0.125",
        "batch_size = 128",
        "mesh.data = -1",
        "parameters 40,228",
        "mesh {'data': 4, 'fsdp': 2} on 8 cpu device(s)",
        "batch 128, 16 per device",
    } <= printed
    keys = set(config_lib.flatten(digits.get_config("small")))
    assert keys <= {line.split(" ")[0] for line in printed}


# ------------------------------------------------------------------ eval


@pytest.fixture(scope="module")
def evaluated(fresh, run_python, tmp_path_factory):
    """Workdir after evaluating EMA and online parameters, folder of samples, both processes."""
    folder = tmp_path_factory.mktemp("evaluated")
    workdir = folder / "run"
    shutil.copytree(fresh[0], workdir)

    def evaluate(*flags):
        return run_python(["-m", "shortcut_jax.eval", SMALL, f"--workdir={workdir}", *flags])

    ema = evaluate(f"--save_samples={folder}/samples/ema.npz")
    online = evaluate(
        f"--save_samples={folder}/samples/online.npz",
        "--config.eval.params=online",
        "--config.eval.steps=(1,)",
    )
    return workdir, folder / "samples", ema, online


def results(workdir, step=8):
    """(metric, sampling steps, params) -> record, of one checkpoint; no protocol twice."""
    records = [r for r in read_lines(workdir / "eval" / "results.jsonl") if r["step"] == step]
    found = {(r["metric"], r["sampling_steps"], r["params"]): r for r in records}
    assert len(found) == len(records)
    return found


def test_eval_writes_one_record_per_protocol(evaluated):
    workdir, _, ema, online = evaluated
    assert ema.returncode == online.returncode == 0
    metrics = ("fd_digits", "fd_digits_mlp64")
    expected = {(m, steps, "ema") for m in metrics for steps in (1, 4)}
    assert set(results(workdir)) == expected | {(m, 1, "online") for m in metrics}
    for record in results(workdir).values():
        assert record["num_samples"] == 50 and np.isfinite(record["value"])


def test_eval_finds_what_the_training_loop_found(fresh, evaluated):
    in_loop = results(fresh[0])
    assert set(in_loop) == {(m, 1, "ema") for m in ("fd_digits", "fd_digits_mlp64")}
    for key, record in in_loop.items():
        assert results(evaluated[0])[key] == record  # the same number and the same protocol
    logged = read_lines(fresh[0] / "metrics.jsonl")[-1]
    assert logged["eval/fd_digits/1_steps"] == in_loop["fd_digits", 1, "ema"]["value"]


def test_eval_prints_where_to_look(evaluated):
    workdir, _, ema, _ = evaluated
    assert "sampling steps" in ema.stdout and "fd_digits_mlp64" in ema.stdout
    for file in ("8/samples.png", "8/curve.png", "results.jsonl"):
        path = workdir / "eval" / file
        assert str(path) in ema.stdout and path.stat().st_size > 0


def test_saved_samples_are_all_of_them(evaluated):
    _, folder, _, _ = evaluated
    # Several numbers of sampling steps give several files, one gives the name asked for.
    assert {path.name for path in folder.iterdir()} == {"ema_1.npz", "ema_4.npz", "online.npz"}
    for path in folder.iterdir():
        with np.load(path) as found:
            assert found.files == ["arr_0", "arr_1"]
            assert found["arr_0"].shape == (50, 8, 8, 1) and found["arr_0"].dtype == np.uint8
            assert found["arr_1"].shape == (50,)
            assert set(found["arr_1"]) <= set(range(10))


def test_ema_and_online_parameters_give_different_samples(evaluated):
    workdir, folder, _, _ = evaluated
    with np.load(folder / "ema_1.npz") as ema, np.load(folder / "online.npz") as online:
        np.testing.assert_array_equal(ema["arr_1"], online["arr_1"])
        assert np.any(ema["arr_0"] != online["arr_0"])
    found = results(workdir)
    assert found["fd_digits", 1, "ema"]["value"] != found["fd_digits", 1, "online"]["value"]


def test_dry_run_of_eval_touches_nothing(fresh, run_python):
    workdir = fresh[0]
    before = files(workdir)
    flags = [SMALL, f"--workdir={workdir}", "--dry_run", "--step=4"]
    done = run_python(["-m", "shortcut_jax.eval", *flags])
    assert done.returncode == 0
    assert str(workdir / "checkpoints" / "4") in done.stdout and "40,228" in done.stdout
    assert files(workdir) == before


def test_eval_of_a_checkpoint_that_is_not_there(fresh, run_python):
    flags = [SMALL, f"--workdir={fresh[0]}", "--step=5"]
    sentence = error_of(run_python(["-m", "shortcut_jax.eval", *flags]))
    assert "--step=5" in sentence and "4" in sentence and "8" in sentence


# ------------------------------------------------------------------ every config file

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.fixture
def take_one_step(monkeypatch, tmp_path):
    """take_one_step(config): trains one step on made-up images of the shape of the data set."""

    def open_dataset(section):
        name, split = section["name"], section["split"]
        image_shape, num_classes = data.describe(section)
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (64, *image_shape), np.uint8)
        label = rng.integers(0, num_classes, 64, np.int32)
        return Dataset(
            name=name, split=split, image_shape=image_shape, num_classes=num_classes, size=64,
            fingerprint="", read=lambda i: {"image": image[i], "label": label[i]},
        )  # fmt: skip

    def run(config: ConfigDict) -> dict[str, float]:
        monkeypatch.setattr(data, "open_dataset", open_dataset)
        options = {**state.compiler_options(), "xla_backend_optimization_level": "0"}
        # compiles in half the time
        monkeypatch.setattr(state, "compiler_options", lambda platform: options)
        # One step, or one for each stage of methods that change during training.
        stages = config_lib.build_objective(config, num_classes=0).num_stages
        config.total_steps, config.log.every = stages, 1
        config.log.tensorboard = False
        config.optimizer.warmup_steps = 0
        assert train.train(config, tmp_path).step == stages
        return read_lines(tmp_path / "metrics.jsonl")[-1]

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_a_step_in_small(name, take_one_step):
    metrics = take_one_step(importlib.import_module(f"configs.{name}").get_config("small"))
    assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_its_data_set(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    validation.check_values(config)
    validation.validate(config, data.describe(config.data)[0])


@pytest.mark.parametrize(
    ("variant", "branches", "parameters"),
    [
        ("objective=consistency_training", "consistency", "ema"),
        ("objective=live_reflow", "empirical reflow", "ema"),
        ("objective=mean_flow", "empirical mean_flow", "ema"),
        (
            "authors_code",
            "empirical " + " ".join(f"bootstrap_1_{2**i}" for i in range(7)),
            "online",
        ),
    ],
)
def test_variants_take_a_step(variant, branches, parameters, take_one_step):
    """What has a teacher, and what is one, is in tests/test_two_phase.py."""
    config = digits.get_config(f"small,{variant}")
    config.batch_size = 64
    assert config.eval.params == parameters
    metrics = take_one_step(config)
    assert metrics["grad_norm"] > 0
    losses = {key for key in metrics if key.startswith("loss/")}
    assert losses == {f"loss/{name}" for name in branches.split()}
