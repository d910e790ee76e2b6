"""Runs that another run cannot learn from or start from: one sentence, and nothing is done."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import celebahq
from shortcut_jax import data, metrics, objectives, pretrained, run, train
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import save_run, small

LEARN_FROM_ONE = ("progressive_distillation", "consistency_distillation", "reflow")


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Path:
    """Workdir of a flow-matching run with a checkpoint at step 2. Tests work on copies of it."""
    workdir = tmp_path_factory.mktemp("runs") / "flow"
    save_run(workdir, small("flow_matching"), steps=(2,))
    return workdir


@pytest.fixture(scope="module")
def flow_of_photographs(tmp_path_factory) -> Path:
    """The same, on photographs."""
    workdir = tmp_path_factory.mktemp("runs") / "photographs"
    config = celebahq.get_config("small,objective=flow_matching")
    config.data.builder = "celebahq256"
    save_run(workdir, config, steps=(2,))
    return workdir


@pytest.fixture(autouse=True)
def other_data_sets(monkeypatch):
    """Data sets like digits, one of them with a label less."""
    digits = data.DATASETS["digits"]
    monkeypatch.setitem(data.DATASETS, "letters", digits)
    monkeypatch.setitem(data.DATASETS, "codes", dataclasses.replace(digits, num_classes=9))


class Accepted(Exception):
    """Data would be opened: the config and the runs that it names are good."""


@pytest.fixture
def accept(monkeypatch):
    """Stops a run before it does anything."""

    def open_dataset(section):
        raise Accepted

    monkeypatch.setattr(data, "open_dataset", open_dataset)


def like(flow: Path, workdir: Path, **changes: Any) -> Path:
    """A copy of a run as if it had been trained with other settings."""
    shutil.copytree(flow, workdir)
    flat = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(flat | changes))
    return workdir


def fill(text: Any, teacher: Path) -> Any:
    return text.replace("TEACHER", str(teacher)) if isinstance(text, str) else text


UNCONDITIONAL, GUIDED = {"objective.cfg_scale": 0.0}, {"objective.cfg_scale": 2.0}
DROPS_LABELS = {"objective.class_dropout": 0.1}
# What the teacher was trained with instead, what the student asks for.
GOOD_TEACHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow matching": ({}, {}),
    "reflow": ({"objective.name": "reflow"}, {}),
    "unconditional": (UNCONDITIONAL, UNCONDITIONAL),
    "guidance of one that saw the null label": (DROPS_LABELS, GUIDED),
    "products in another type": ({"model.dtype": "bfloat16"}, {}),
    "other rows, steps, optimizer": (
        {"data.split": "test", "total_steps": 9, "optimizer.lr": 1.0, "seed": 5}, {}
    ),
    "the same start": ({}, {"init_from": "TEACHER/checkpoints/2"}),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "asked"), GOOD_TEACHERS.values(), ids=GOOD_TEACHERS)
def test_good_teachers(accept, flow, tmp_path, changes, asked):
    teacher = like(flow, tmp_path / "teacher", **changes)
    asked = {key: fill(value, teacher) for key, value in asked.items()}
    for objective in LEARN_FROM_ONE:
        if objective == "consistency_distillation" and asked == GUIDED:
            continue  # which it has none of
        config = small(objective, teacher=str(teacher), **asked)
        with pytest.raises(Accepted):
            train.train(config, tmp_path / "run")


BAD_TEACHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "no run": (
        "TEACHER/absent", {}, {},
        ("names no run", "absent/config.json", "expected the workdir", "mend the path"),
    ),
    "its checkpoints": ("TEACHER/checkpoints", {}, {}, ("names no run", "WORKDIR/checkpoints/")),
    "its config": ("TEACHER/config.json", {}, {}, ("names no run", "mend the path")),
    "a name too long to look for": ("x" * 5000, {}, {}, ("names no run", "mend the path")),
    "a checkpoint that is not there": (
        "TEACHER/checkpoints/7", {}, {}, ("not:", "TEACHER has 2;", "choose one of them"),
    ),
    "another network": (
        "TEACHER", {"model.depth": 3, "model.time_scale": 1.0}, {},
        ("another network", "model.depth: 3 there, 1 here", "model.time_scale: 1.0 there, 1000.0"),
    ),
    "another network here": (
        "TEACHER", {}, {"model.mlp_ratio": 2.0}, ("model.mlp_ratio: 4.0 there, 2.0 here", "use"),
    ),
    "other images": (
        "TEACHER", {"data.name": "fashion_mnist"}, {},
        ("another network", "images: 32x32x1 of 10 classes there, 8x8x1 of 10 classes here"),
    ),
    "images that nobody knows": (
        "TEACHER", {"data.name": "faces"}, {},
        ("another network", "images: unknown (There is no data set 'faces'", "8x8x1 of 10 "),
    ),
    "another data set of such images": (
        "TEACHER", {"data.name": "letters"}, {},
        ("was trained on other data (data.name: letters there, digits here)", "expected the data"),
    ),
    "unconditional": (
        "TEACHER", UNCONDITIONAL, {},
        ("is unconditional (its objective.cfg_scale=0.0)", "cfg_scale=1.0 here", "both", "change"),
    ),
    "conditional": (
        "TEACHER", {}, UNCONDITIONAL,
        ("is conditional (its objective.cfg_scale=1.0)", "cfg_scale=0.0 here", "use another"),
    ),
    **{
        f"trained with {name}": (
            "TEACHER", {"objective.name": name}, {},
            (f"was trained with objective={name}", "flow_matching or reflow", "train one"),
        )
        for name in objectives.OBJECTIVES if name not in pretrained.TEACHERS
    },
}  # fmt: skip


def refused(flow: Path, tmp_path: Path, objective: str, changes: dict, **asked: Any) -> str:
    """What is said of the run that `asked` names as TEACHER; nothing is done, nothing written."""
    teacher = like(flow, tmp_path / "teacher", **changes)
    asked = {key: fill(value, teacher) for key, value in asked.items()}
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        train.train(small(objective, **asked), tmp_path / "run")
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()
    return str(error.value).replace(str(teacher), "TEACHER")


@pytest.mark.parametrize(
    ("text", "changes", "asked", "fragments"), BAD_TEACHERS.values(), ids=BAD_TEACHERS
)
@pytest.mark.parametrize("objective", LEARN_FROM_ONE)
def test_bad_teachers(accept, flow, tmp_path, objective, text, changes, asked, fragments):
    said = refused(flow, tmp_path, objective, changes, teacher=text, **asked)
    assert_sentence(said, ("teacher=", *fragments))


@pytest.mark.parametrize("objective", ["progressive_distillation", "reflow"])
def test_guidance_of_a_teacher_that_never_saw_the_null_label(accept, flow, tmp_path, objective):
    said = refused(flow, tmp_path, objective, {}, teacher="TEACHER", **GUIDED)
    fragments = ("objective.cfg_scale=2.0", "never saw the null label", "use one", "cfg_scale=1")
    assert_sentence(said, fragments)


@pytest.mark.parametrize("key", ["teacher", "init_from"])
def test_a_run_without_a_checkpoint(accept, flow, tmp_path, key):
    empty = tmp_path / "empty"
    run.claim_workdir(small("flow_matching"), empty)
    objective = "shortcut" if key == "init_from" else "reflow"
    said = refused(flow, tmp_path, objective, {}, **{key: str(empty)})
    assert_sentence(said, (f"{key}={empty}", "has none yet", "train that run first"))


@pytest.mark.parametrize(
    ("text", "changes", "fragments"),
    [
        ("TEACHER/absent", {}, ("names no run", "mend the path")),
        ("TEACHER/checkpoints/7", {}, ("TEACHER has 2;", "choose one of them")),
        ("TEACHER", {"model.depth": 3}, ("another network", "model.depth: 3 there, 1 here")),
        ("TEACHER", {"data.name": "fashion_mnist"}, ("another network", "images: 32x32x1 of 10")),
        ("TEACHER", {"data.name": "codes"}, ("another network", "8x8x1 of 9 classes there")),
    ],
    ids=["no run", "no such checkpoint", "another network", "other images", "other labels"],
)
@pytest.mark.parametrize("objective", ["shortcut", "progressive_distillation"])
def test_bad_starts(accept, flow, tmp_path, objective, text, changes, fragments):
    asked = {"teacher": str(flow)} if objective in LEARN_FROM_ONE else {}
    said = refused(flow, tmp_path, objective, changes, init_from=text, **asked)
    assert_sentence(said, ("init_from=", *fragments))


BUILDERS = {"data.builder": "birds"}, {"data.builder": "faces"}


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        (*BUILDERS, "data.builder: birds there, faces here"),
        ({"data.crop": "authors"}, {}, "data.crop: authors there, adm here"),
        ({}, {"data.crop": "adm", "data.builder": "celebahq256"}, ""),
    ],
)
def test_who_teaches_saw_the_same_images_and_who_is_tuned_need_not(
    flow_of_photographs, tmp_path, caplog, there, here, line
):
    origin = like(flow_of_photographs, tmp_path / "origin", **there)

    def find(objective, **asked):
        config = celebahq.get_config(f"small,objective={objective}")
        config.update_from_flattened_dict({"data.builder": "celebahq256", **here, **asked})
        return pretrained.find(config)

    with caplog.at_level("INFO", logger="absl"):
        assert find("shortcut", init_from=str(origin)).init_from.step == 2
    said = f"init_from={origin} was trained on other data: {line}."
    assert (said in caplog.text) if line else ("other data" not in caplog.text)
    if not line:
        assert find("reflow", teacher=str(origin)).teacher.step == 2
        return
    with pytest.raises(UserError) as error:
        find("reflow", teacher=str(origin))
    assert_sentence(str(error.value), (f"teacher={origin} was trained on other data", line, "use"))


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_a_teacher_with_a_damaged_config(accept, flow, tmp_path, content):
    teacher = like(flow, tmp_path / "teacher")
    (teacher / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        train.train(small("reflow", teacher=str(teacher)), tmp_path / "run")
    assert_sentence(
        str(error.value), (str(teacher / "config.json"), "cannot be read as JSON", "restore")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["progressive_distillation", "reflow"])
def test_a_teacher_with_a_damaged_checkpoint(monkeypatch, flow, tmp_path, objective):
    teacher = like(flow, tmp_path / "teacher")
    for path in (teacher / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    before = contents(teacher)
    monkeypatch.setattr(metrics, "load_extractor", lambda *_: None)
    with pytest.raises(UserError) as error:
        train.train(small(objective, teacher=str(teacher)), tmp_path / "run")
    assert_sentence(str(error.value), (str(teacher / "checkpoints" / "2"), "cannot be read"))
    assert contents(teacher) == before
    assert set(contents(tmp_path / "run")) == {"config.json"}
