"""Whole runs of methods with two phases: started, killed, and started again without the first."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from shortcut_jax import checkpoint, metrics, pairs, pretrained, state, train
from shortcut_jax.errors import UserError
from tests import untrained_runs
from tests.sentences import assert_sentence, contents

TOTAL = 8
M = 8  # three stages of progressive distillation, which begin at
STAGES = (0, 3, 6)
LEARNED = ("params", "ema", "opt_state", "teacher")


def small(objective: str, **overrides: Any) -> ConfigDict:
    every = {"checkpoint.every": 1, "checkpoint.keep": TOTAL, "eval.every": 0}
    return untrained_runs.small(objective, **every, **{"log.tensorboard": False, **overrides})


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is over. States are on the host."""

    config: ConfigDict
    workdir: Path
    started: state.TrainState | None  # as it was before the first step; None if it was resumed
    final: state.TrainState
    _shapes: Any

    def saved(self, step: int, *fields: str) -> dict[str, Any]:
        """Parts of the state in a checkpoint."""
        wanted = {name: getattr(self._shapes, name) for name in fields}
        checkpoints = checkpoint.Checkpoints(self.workdir, keep=1, read_only=True)
        return jax.device_get(checkpoints.restore(step, wanted))

    def as_if_killed_after(self, step: int, workdir: Path) -> Path:
        """A copy of the workdir in which `step` is the last checkpoint; 0 for none."""
        shutil.copytree(self.workdir, workdir)
        (workdir / "finished.json").unlink()
        for later in range(step + 1, TOTAL + 1):
            shutil.rmtree(workdir / "checkpoints" / str(later))
        return workdir


def start(config: ConfigDict, workdir: Path) -> Run:
    """Runs to the end what the same command runs."""
    started = []

    def start_from(*args):
        made = original(*args)
        started.append(jax.device_get(made))
        return made

    original = pretrained.start_from
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "start_from", start_from)
        final = train.train(config, workdir)
    shapes = checkpoint.with_shardings(final, jax.tree.map(lambda a: a.sharding, final))
    return Run(config, workdir, started[0] if started else None, jax.device_get(final), shapes)


@pytest.fixture(scope="module", autouse=True)
def faster():
    """Compiles in half the time, measures nothing, and makes pairs in several shards."""
    options = {**state.compiler_options(), "xla_backend_optimization_level": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "compiler_options", lambda platform: options)
        patch.setattr(metrics, "load_extractor", lambda name: None)
        patch.setattr(pairs, "SHARD_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Run:
    """The teacher of all."""
    return start(small("flow_matching"), tmp_path_factory.mktemp("runs") / "flow")


def distil(flow: Run, root: Path, objective: str, **overrides: Any) -> Run:
    """A student of a teacher that is gone when it has finished."""
    teacher = shutil.copytree(flow.workdir, root / "teacher")
    run = start(small(objective, teacher=str(teacher), **overrides), root / "student")
    shutil.rmtree(teacher)
    return run


@pytest.fixture(scope="module")
def progressive(flow, tmp_path_factory) -> Run:
    overrides = {"objective.denoise_timesteps": M}
    root = tmp_path_factory.mktemp("progressive")
    return distil(flow, root, "progressive_distillation", **overrides)


@pytest.fixture(scope="module")
def consistency(flow, tmp_path_factory) -> Run:
    return distil(flow, tmp_path_factory.mktemp("consistency"), "consistency_distillation")


@pytest.fixture(scope="module")
def reflow(flow, tmp_path_factory) -> Run:
    config = small("reflow", teacher=str(flow.workdir))
    return start(config, tmp_path_factory.mktemp("reflow") / "student")


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def differ(a, b) -> bool:
    pairs_of_leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(not np.array_equal(x, y) for x, y in pairs_of_leaves)


def assert_same_end(resumed: Run, undisturbed: Run):
    assert resumed.started is None  # it did resume
    assert resumed.final.step == TOTAL
    for name in LEARNED:
        assert_equal(getattr(resumed.final, name), getattr(undisturbed.final, name))


# ------------------------------------------------------------------ the start


@pytest.mark.parametrize("name", ["progressive", "consistency", "reflow"])
def test_a_student_starts_at_the_ema_of_its_teacher(request, flow, name):
    run = request.getfixturevalue(name)
    assert differ(flow.final.ema, flow.final.params)
    for part in (run.started.params, run.started.ema):
        assert_equal(part, flow.final.ema)
    assert run.started.step == 0
    assert not any(np.any(a) for a in jax.tree.leaves(run.started.opt_state))
    assert differ(run.final.params, run.started.params)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Run:
    config = small("diffusion", **{"total_steps": 1})
    return start(config, tmp_path_factory.mktemp("runs") / "diffusion")


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_a_shortcut_model_starts_at_the_ema_of_another_run(request, name, tmp_path):
    origin = request.getfixturevalue(name)
    config = small("shortcut", init_from=str(origin.workdir), **{"total_steps": 1})
    run = start(config, tmp_path)
    assert_equal((run.started.params, run.started.ema), (origin.final.ema, origin.final.ema))
    assert run.started.step == 0 and run.started.teacher == {}
    assert not any(np.any(a) for a in jax.tree.leaves(run.started.opt_state))
    assert run.final.step == 1


# ------------------------------------------------------------------ who teaches


def test_the_teacher_is_the_ema_of_the_student_at_the_last_end_of_a_stage(flow, progressive):
    for step in range(1, TOTAL + 1):
        # The step that begins a stage promotes; its checkpoint is the one after it.
        began = max(s for s in STAGES if s < step)
        expected = progressive.saved(began, "ema")["ema"] if began else flow.final.ema
        assert_equal(progressive.saved(step, "teacher")["teacher"], expected)
    assert differ(progressive.final.teacher, flow.final.ema)


def test_other_teachers_stay(flow, consistency, reflow):
    assert_equal(consistency.final.teacher, flow.final.ema)
    assert reflow.final.teacher == {}


# ------------------------------------------------------------------ killed and started again


# At the end of a stage: the teacher that the next step promotes is not yet in the checkpoint.
@pytest.mark.parametrize(
    "step", [3, 4, 7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 6))]
)
def test_progressive_distillation_resumes_without_its_first_teacher(progressive, tmp_path, step):
    assert not Path(progressive.config.teacher).exists()
    workdir = progressive.as_if_killed_after(step, tmp_path / "copy")
    assert_same_end(start(progressive.config, workdir), progressive)


def test_consistency_distillation_resumes_without_its_teacher(consistency, tmp_path):
    assert not Path(consistency.config.teacher).exists()
    workdir = consistency.as_if_killed_after(4, tmp_path / "copy")
    assert_same_end(start(consistency.config, workdir), consistency)


def test_reflow_resumes_without_its_teacher(reflow, tmp_path):
    workdir = reflow.as_if_killed_after(5, tmp_path / "copy")
    before = contents(workdir / "pairs")
    config = reflow.config.copy_and_resolve_references()
    config.teacher = str(tmp_path / "nowhere")
    assert_same_end(start(config, workdir), reflow)
    assert contents(workdir / "pairs") == before


def test_reflow_killed_while_it_makes_pairs(reflow, tmp_path):
    workdir = reflow.as_if_killed_after(0, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints")
    made = {p.name: p.read_bytes() for p in (workdir / "pairs").iterdir()}
    assert sorted(made) == ["00000.npy", "00001.npy", "00002.npy", "manifest.json"]
    for name in ("00001.npy", "00002.npy"):
        (workdir / "pairs" / name).unlink()
    first = (workdir / "pairs" / "00000.npy").stat().st_mtime_ns

    again = start(reflow.config, workdir)
    assert {p.name: p.read_bytes() for p in (workdir / "pairs").iterdir()} == made
    assert (workdir / "pairs" / "00000.npy").stat().st_mtime_ns == first
    for name in LEARNED:
        assert_equal(getattr(again.final, name), getattr(reflow.final, name))


def test_reflow_goes_on_with_its_own_pairs_only(reflow, tmp_path):
    workdir = reflow.as_if_killed_after(7, tmp_path / "copy")
    path = workdir / "pairs" / "manifest.json"
    found = json.loads(path.read_text())
    for change, said in (
        ({"teacher_digest": "0" * 16}, "checkpoints/7 was trained on other data: digits pairs"),
        ({"steps": 5}, "holds other pairs than the config asks for"),
    ):
        path.write_text(json.dumps({**found, **change}))
        before = contents(workdir)
        with pytest.raises(UserError) as error:
            train.train(reflow.config, workdir)
        assert_sentence(str(error.value), (said,))
        assert contents(workdir) == before


@pytest.mark.parametrize("step", [0, 5])
def test_reflow_needs_the_same_teacher_for_missing_pairs(flow, reflow, tmp_path, step):
    workdir = reflow.as_if_killed_after(step, tmp_path / "copy")
    if step:
        (workdir / "pairs" / "00001.npy").unlink()
    else:  # as if it had been killed before its first checkpoint: it starts from the teacher, too
        shutil.rmtree(workdir / "checkpoints")
    teacher = shutil.copytree(flow.workdir, tmp_path / "teacher")
    shutil.rmtree(teacher / "checkpoints" / str(TOTAL))  # another is its newest
    config = reflow.config.copy_and_resolve_references()
    config.teacher = str(teacher)
    (workdir / "config.json").write_text(
        (workdir / "config.json").read_text().replace(str(flow.workdir), str(teacher))
    )
    before = contents(workdir)
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    fragments = ("holds other pairs", "teacher_step: 8 -> 7", "teacher_digest: ")
    assert_sentence(str(error.value), fragments)
    assert contents(workdir) == before


def test_reflow_trains_on_its_pairs(reflow, flow, tmp_path):
    """Other images under the same noises make another student."""
    workdir = reflow.as_if_killed_after(0, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints")
    for path in (workdir / "pairs").glob("*.npy"):
        shard = np.load(path)
        shard["image"] *= -1
        np.save(path, shard)
    other = start(reflow.config, workdir)
    assert_equal(other.started.params, reflow.started.params)
    assert differ(other.final.params["output"], reflow.final.params["output"])
