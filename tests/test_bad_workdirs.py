"""Data, workdirs and checkpoints that are wrong: one sentence, and nothing is changed or lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import fashion_mnist
from shortcut_jax import checkpoint, checksums, metrics, run, train
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence, contents
from tests.small_digits import SMALL, small

TINY_ARG = "small,objective=flow_matching"  # one pass per step: quick to compile
TINY = {
    "total_steps": 2, "batch_size": 4, "checkpoint.every": 2, "log.every": 2,
    "log.tensorboard": False, "eval.every": 0, "model.hidden_size": 4, "model.num_heads": 1,
    "model.patch_size": 8, "optimizer.lr": 1e-3, "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}  # fmt: skip


class NoExtractor:
    sha256 = ""


@pytest.fixture(autouse=True)
def no_extractor(monkeypatch):
    """Nothing here measures samples."""
    monkeypatch.setattr(metrics, "load_extractor", lambda name: NoExtractor())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def tiny(data_dir: str, **overrides: Any) -> ConfigDict:
    return small(TINY_ARG, **{**TINY, "data.data_dir": data_dir, **overrides})


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        ({"idx_dir": "absent"}, ("idx_dir=absent", "train-images-idx3-ubyte.gz", "put", "set")),
        ({"data_dir": "gs://a/b"}, ("data_dir=gs://a/b", "expected a local folder", "set")),
        ({"data_dir": "a_file/x"}, ("data_dir=a_file/x", "expected a local folder", "set")),
    ],
)
def test_missing_data(monkeypatch, tmp_path, data, fragments):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    config = fashion_mnist.get_config("small")
    config.data.update({"data_dir": "prepared", "idx_dir": "absent", **data})
    if data.get("data_dir") == "a_file/x":  # fashion_mnist would ask for its source first
        config = small(**{"data.data_dir": "a_file/x"})
    with pytest.raises(UserError) as error:
        train.train(config, "run")
    assert_sentence(str(error.value), fragments)
    assert not Path("run", "checkpoints").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir) -> Path:
    """The workdir of a run of two steps. Tests work on copies of it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load_extractor", lambda name: NoExtractor())
        train.train(tiny(data_dir), workdir)
    return workdir


def test_workdir_of_another_config(trained, data_dir):
    before = contents(trained)
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, **{"batch_size": 8, "optimizer.lr": 0.5}), trained)
    assert_sentence(
        str(error.value),
        (
            str(trained / "config.json"),
            "batch_size: 4 -> 8",
            "optimizer.lr: 0.001 -> 0.5",
            "another --workdir",
        ),
    )
    assert "total_steps" not in str(error.value)
    assert contents(trained) == before


@pytest.mark.parametrize("workdir", ["a_file", "a_file/run"])
def test_workdir_that_cannot_be_made(tmp_path, data_dir, workdir):
    (tmp_path / "a_file").write_text("mine")
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir), tmp_path / workdir)
    assert_sentence(
        str(error.value), ("--workdir", str(tmp_path / workdir), "cannot be written", "choose")
    )
    assert (tmp_path / "a_file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"], ids=["cut", "list", "binary"])
@pytest.mark.parametrize("binary", ["main", "eval"])
def test_damaged_config_json(tmp_path, data_dir, content, binary):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        if binary == "main":
            train.train(tiny(data_dir), tmp_path)
        else:
            run.check_workdir_for_evaluation(tiny(data_dir), tmp_path)
    assert_sentence(
        str(error.value),
        (str(tmp_path / "config.json"), "cannot be read as JSON", "expected", "restore"),
    )
    assert contents(tmp_path) == {"config.json": content}


def test_evaluation_with_another_ema_rate_is_refused(data_dir, tmp_path):
    config = tiny(data_dir)
    run.claim_workdir(config, tmp_path)
    run.check_workdir_for_evaluation(config, tmp_path)
    config.ema_rate = 0.75  # a record would name it
    with pytest.raises(UserError) as error:
        run.check_workdir_for_evaluation(config, tmp_path)
    assert_sentence(str(error.value), (str(tmp_path / "config.json"), "-> 0.75", "Use that config"))


def remove_meta(step: Path) -> None:
    shutil.rmtree(step / "meta")


def remove_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def cut_state(step: Path) -> None:
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])


def replace_all(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()
    (step / "model.pt").write_text("of another program")


def change_data(step: Path) -> None:
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["data"]["dataset"] = "0123456789abcdef"
    path.write_text(json.dumps(with_checksum(meta)))


def change_config(step: Path) -> None:
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["model.depth"] = 7
    path.write_text(json.dumps(with_checksum(meta)))


def flip_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"model.depth": 1', '"model.depth": 9'))


def with_checksum(meta: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in meta.items() if k != checkpoint.CHECKSUMS}
    sums = {**meta[checkpoint.CHECKSUMS], "rest": checksums.of_json(rest)}
    return {**rest, checkpoint.CHECKSUMS: sums}


UNREADABLE = ("checkpoint", "cannot be read", "expected a whole checkpoint", "move that directory")


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (remove_meta, UNREADABLE),
        (remove_state, UNREADABLE),
        (cut_state, UNREADABLE),
        (replace_all, UNREADABLE),
        (flip_meta, (*UNREADABLE, "checksum")),
        (change_data, ("other data", "0123456789abcdef", "restore that data", "--workdir")),
        (change_config, ("another config", "model.depth: 7 -> 1", "Use that config")),
    ],
)
def test_damaged_and_foreign_checkpoints(trained, data_dir, tmp_path, damage, fragments):
    workdir = shutil.copytree(trained, tmp_path / "run")
    damage(workdir / "checkpoints" / "2")
    before = contents(workdir)
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, total_steps=4), workdir)
    assert_sentence(str(error.value), (str(workdir / "checkpoints" / "2"), *fragments))
    assert contents(workdir) == before  # also config.json, though total_steps may change


def test_fewer_steps_than_done(trained, data_dir, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = contents(workdir)
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, total_steps=1), workdir)
    assert contents(workdir) == before
    assert_sentence(str(error.value), ("checkpoints/2", "total_steps=1", "at least 2"))


def test_more_steps_than_done_are_recorded(trained, data_dir, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    train.train(tiny(data_dir, total_steps=3), workdir)
    assert run.read_config(workdir)["total_steps"] == run.finished_step(workdir) == 3


@pytest.mark.parametrize("objective", ["progressive_distillation", "consistency_training"])
def test_another_length_of_a_staged_run(trained, data_dir, tmp_path, objective):
    """Where its stages begin depends on the last step, whatever the learning rate does."""
    teacher = str(trained) if objective == "progressive_distillation" else ""

    def config(total_steps: int) -> ConfigDict:
        overrides = {**TINY, "data.data_dir": data_dir, "total_steps": total_steps}
        return small(f"small,objective={objective}", teacher=teacher, **overrides)

    assert config(8).optimizer.schedule == "constant"
    run.claim_workdir(config(8), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        train.train(config(16), tmp_path)
    assert_sentence(
        str(error.value), ("another config", "total_steps: 8 -> 16", "another --workdir")
    )
    assert contents(tmp_path) == before


# ------------------------------------------------------------------- a loss that is not finite


def logged(workdir: Path, name: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def test_nonfinite_loss_stops_the_run(data_dir, tmp_path):
    # The first step is taken with a fresh network; its update makes the second loss overflow.
    config = tiny(
        data_dir, **{"total_steps": 8, "optimizer.lr": 1e30, "checkpoint.every": 1, "log.every": 4}
    )
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path)
    fragments = (
        "between steps 1 and 2",
        "checkpoint is 1",
        "lower optimizer.lr",
        "on_nonfinite=skip",
    )
    assert_sentence(str(error.value), fragments)
    assert checkpoint.Checkpoints(tmp_path, keep=3, read_only=True).steps() == [1]
    assert not (tmp_path / run.FINISHED).exists()


def test_nonfinite_steps_are_skipped(data_dir, tmp_path):
    config = tiny(data_dir, **{"total_steps": 6, "optimizer.lr": 1e30})
    config.optimizer.on_nonfinite = "skip"
    state = train.train(config, tmp_path)
    assert int(state.step) == 6
    assert logged(tmp_path, train.NONFINITE) == [0.5, 1.0, 1.0]
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
        assert np.isfinite(leaf).all()
    assert (tmp_path / run.FINISHED).exists()


# ------------------------------------------------------------------- the binaries themselves


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ((SMALL, "--config.objective.bootstrap_frac=0.1"), ("objective.bootstrap_fraction?",)),
        ((SMALL, "--config.model.patch_size=3"), ("model.patch_size=3", "8x8")),
        ((SMALL, "--config.mesh.data=2"), ("mesh=", "1 device(s)")),
    ],
    ids=["flag", "value", "mesh"],
)
def test_status_and_output_of_training(run_python, tmp_path, args, fragments):
    workdir = tmp_path / "run"
    done = run_python(["-m", "shortcut_jax.main", *args, f"--workdir={workdir}"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert_sentence(last, fragments)
    assert not workdir.exists()


# One process for all cases: starting one takes longer than any of them.
EVALUATE = """
import json, sys
from absl.testing import flagsaver
from shortcut_jax import eval
from shortcut_jax.errors import UserError
for args in json.loads(sys.argv.pop()):
    sys.argv = ["eval", *args]
    with flagsaver.flagsaver():
        try:
            eval.main(eval.parse(sys.argv)[1])
            print("accepted")
        except UserError as error:
            print(error)
"""
BAD_EVALUATIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((SMALL,), ("--workdir is missing", "give the folder")),
    ((SMALL, "--workdir=WORK/absent"), ("WORK/absent", "no run", "expected", "train first")),
    ((SMALL, "--workdir=WORK/empty"), ("no finished checkpoint", "expected at least one", "train")),
    (("OWN", "--config.model.depth=2"), ("config.json", "depth: 1 -> 2", "another --workdir")),
    (("OWN", "--step=7"), ("--step=7", "expected one of 2", "newest")),
    (("OWN", "--save_samples=WORK/s.png"), ("--save_samples=", "s.png", "expected", ".npz")),
    (("OWN", "--save_samples=WORK/a_file/s.npz"), ("--save_samples", "WORK/a_file", "choose")),
]  # fmt: skip


def test_evaluation_refuses(run_python, trained, tmp_path, data_dir):
    flat = {**TINY, "data.data_dir": data_dir}
    own = [f"--config=configs/digits.py:{TINY_ARG}", f"--workdir={trained}"]
    own += [f"--config.{key}={value}" for key, value in flat.items()]
    (tmp_path / "a_file").write_text("")
    (tmp_path / "empty").mkdir()
    run.claim_workdir(small(), tmp_path / "empty")
    before = contents(tmp_path)

    def fill(text: str) -> str:
        return text.replace("WORK", str(tmp_path))

    cases = [
        [fill(word) for arg in args for word in (own if arg == "OWN" else [arg])]
        for args, _ in BAD_EVALUATIONS
    ]
    done = run_python(["-c", EVALUATE, json.dumps(cases)])
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert len(answers) == len(cases)
    for answer, (_, fragments) in zip(answers, BAD_EVALUATIONS, strict=True):
        assert_sentence(answer, tuple(map(fill, fragments)))
    assert contents(tmp_path) == before
