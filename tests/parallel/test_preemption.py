"""A run that is asked to leave saves, says so, and is continued as if nothing had been."""

import os
import signal
import threading

import pytest

from configs import digits
from shortcut_jax import checkpoint, program, run, state, train
from shortcut_jax.parallel import preemption
from tests.test_resume import finished_checkpoints, read_lines, read_meta

TOTAL, LEAVES = 4, 2


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    with pytest.MonkeyPatch.context() as patch:
        options = {**state.compiler_options("cpu"), "xla_backend_optimization_level": "0"}
        patch.setattr(state, "compiler_options", lambda platform: options)
        yield


def config():
    c = digits.get_config("small")
    c.total_steps, c.checkpoint.every, c.eval.every = TOTAL, TOTAL, LEAVES
    c.eval.num_samples, c.eval.metrics = 32, ()
    c.log.update(every=1, tensorboard=False)
    return c


@pytest.fixture
def signalled(monkeypatch):
    """signalled(step): SIGTERM comes, and comes again, before that step."""
    dispatches = program.dispatches

    def install(at):
        def interrupted(config, first):
            for step, count in dispatches(config, first):
                if step == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step, count

        monkeypatch.setattr(program, "dispatches", interrupted)

    yield install
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_it_saves_at_the_next_step_and_goes_on_from_there(signalled, tmp_path, monkeypatch):
    """That a run continues from a checkpoint to the last bit is in tests/test_resume.py."""
    copied, copies = checkpoint._copied, []
    monkeypatch.setattr(checkpoint, "_copied", lambda tree: copies.append(tree) or copied(tree))
    compilations = []
    monkeypatch.setattr(run, "report_compiled", lambda *args: compilations.append(args[-1]))
    signalled(LEAVES)  # where an evaluation is due, for which there may be no time
    with pytest.raises(preemption.Preempted, match=f"asked to leave at step {LEAVES}"):
        train.train(config(), tmp_path)
    assert finished_checkpoints(tmp_path) == [LEAVES]
    assert read_meta(tmp_path, LEAVES)["unevaluated"] is True
    assert len(copies) == 1  # on the device, and whole when the run had ended
    assert not (tmp_path / "eval").exists() and not (tmp_path / "finished.json").exists()

    signalled(TOTAL)  # at the end, where the evaluation is all that is left to do
    with pytest.raises(preemption.Preempted, match=f"asked to leave at step {TOTAL}"):
        train.train(config(), tmp_path)
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"results.jsonl", str(LEAVES)}
    assert not (tmp_path / "finished.json").exists()
    # Each start says what it took itself; the clock has the sum.
    spent = read_meta(tmp_path, TOTAL)["clock"]["seconds/compile"]
    assert sum(compilations) == pytest.approx(spent) and len(compilations) == 2

    signalled(None)
    assert train.train(config(), tmp_path).step == TOTAL
    assert (tmp_path / "eval" / str(TOTAL) / "samples.png").exists()
    assert (tmp_path / "finished.json").exists()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(signalled, tmp_path):
    signalled(0)
    with pytest.raises(preemption.Preempted, match="step 0"):
        train.train(config(), tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_threads_leave_signals_alone():
    found = []

    def enter():
        with preemption.Notice() as notice:
            found.append(notice.reached())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_command_ends_with_the_status_that_is_tried_again(run_python, tmp_path):
    code = (
        "from shortcut_jax import cli; from shortcut_jax.parallel import preemption\n"
        "def main(): raise preemption.Preempted('asked to leave at step 3 of runs/a')\n"
        "cli.main(main)"
    )
    done = run_python(["-c", code])
    assert done.returncode == 75 == preemption.EXIT_STATUS
    assert done.stderr.splitlines()[-1].startswith("preempted: asked to leave at step 3 of runs/a")
