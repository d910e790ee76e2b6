"""What fails under a training run ends it, with what was saved before left whole."""

import errno
import resource

import pytest

from configs import digits
from shortcut_jax import checkpoint, run, state, train
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import measuring
from tests.sentences import assert_sentence
from tests.test_resume import finished_checkpoints, read_lines


@pytest.fixture
def config(monkeypatch):
    options = {**state.compiler_options("cpu"), "xla_backend_optimization_level": "0"}
    monkeypatch.setattr(state, "compiler_options", lambda platform: options)
    c = digits.get_config("small")
    c.total_steps, c.checkpoint.every, c.eval.every = 400, 2, 0
    c.log.update(every=1, tensorboard=False)
    return c


def test_a_workdir_that_cannot_be_written(config, monkeypatch):
    monkeypatch.setattr(train, "make_train_step", None)  # nothing is compiled for it
    with pytest.raises(UserError) as error:
        train.train(config, "/proc/shortcut_jax")  # where not even root can make a folder
    assert_sentence(str(error.value), ["--workdir", "/proc/shortcut_jax", "cannot be written"])


@pytest.mark.parametrize("write", [run.claim_workdir, run.record_config])
def test_a_disk_without_room_for_the_config_is_a_sentence(config, tmp_path, monkeypatch, write):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "write_atomically", full)
    with pytest.raises(UserError) as error:
        write(config, tmp_path)
    assert_sentence(str(error.value), ["--workdir", str(tmp_path), "No space left", "choose"])


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_at_the_next_log_line(config, tmp_path, monkeypatch):
    config.checkpoint.every = 100
    save, limits = checkpoint.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self, step, *args):
        if step == 200:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        save(self, step, *args)
        if step == 200:  # let the background come to its end before the next step
            while not self._begun.done() or self._manager.is_saving_in_progress():
                pass

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_on_a_full_disk)
    try:
        with pytest.raises(UserError) as error:
            train.train(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_sentence(str(error.value), ["could not be written", "File too large", "one is 100"])
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 200
    assert finished_checkpoints(tmp_path) == [100]
    assert not (tmp_path / "finished.json").exists()


@pytest.mark.slow
def test_an_evaluation_that_fails_leaves_the_checkpoints(config, tmp_path, monkeypatch):
    config.eval.update(every=3, num_samples=32, metrics=())

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measuring.Evaluator, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train.train(config, tmp_path)
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 3
    assert finished_checkpoints(tmp_path) == [2]  # which may have been under way
