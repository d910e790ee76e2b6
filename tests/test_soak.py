"""A run that is killed again and again, wherever it stands, is the run that never was."""

import random
import signal

import pytest

from tests.test_resume import (
    assert_same_arrays,
    finished_checkpoints,
    read_lines,
    read_state,
)

TOTAL, KEEP = 500, 2
FLAGS = (
    "--config=configs/digits.py:small",
    f"--config.total_steps={TOTAL}",
    f"--config.checkpoint.keep={KEEP}",
    "--config.checkpoint.every=4",
    "--config.eval.every=10",
    "--config.log.every=2",
    "--config.log.tensorboard=False",
)
# Phase -> the most often that it is reached, and the longest that a kill waits after that.
PHASES = {"start": (1, 8.0), "train": (12, 0.1), "save": (3, 0.4), "evaluate": (2, 0.6)}
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def files(workdir):
    """Every file but the checkpoints' own, whose names tensorstore makes up."""
    paths = (path for path in workdir.rglob("*") if path.is_file())
    relative = (path.relative_to(workdir) for path in paths)
    return sorted(str(path) for path in relative if path.parts[0] != "checkpoints")


def soak(run_python, folder, kills, seed):
    """Kills one run `kills` times and lets another be; returns both workdirs and the phases."""
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    draw, phases, newest = random.Random(seed), [], 0

    def start(workdir, **env):
        args = ["-m", "tests.programs.killed_main", f"--workdir={workdir}", *FLAGS]
        return run_python(args, env={**FAST, **env}, timeout=280)

    assert start(undisturbed).returncode == 0
    while len(phases) < kills:
        phase = draw.choice(list(PHASES))
        often, seconds = PHASES[phase]
        done = start(killed, KILL=f"{phase}:{draw.randint(1, often)}:{draw.uniform(0, seconds)}")
        assert done.returncode == -signal.SIGKILL, done.stderr
        phases.append(phase)
        print(len(phases), phase, finished_checkpoints(killed) if newest else "", flush=True)
        if newest:
            assert "Resumed from step" not in done.stderr or f"step {newest} of" in done.stderr
        if (killed / "checkpoints").exists():
            steps = finished_checkpoints(killed)
            assert max(steps, default=0) >= newest  # none is lost
            newest = max(steps, default=0)
    done = start(killed)
    assert done.returncode == 0 and (not newest or f"Resumed from step {newest} of" in done.stderr)
    return killed, undisturbed, phases


def check(killed, undisturbed):
    assert_same_arrays(read_state(undisturbed, TOTAL), read_state(killed, TOTAL))
    for name in ("metrics.jsonl", "eval/results.jsonl"):
        assert read_lines(killed / name) == read_lines(undisturbed / name)
    assert files(killed) == files(undisturbed)  # nothing is left behind
    kept = {path.name for path in (killed / "checkpoints").iterdir()}
    assert kept == {path.name for path in (undisturbed / "checkpoints").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills_change_nothing(run_python, tmp_path):
    killed, undisturbed, phases = soak(run_python, tmp_path, kills=50, seed=0)
    assert set(phases) == set(PHASES)
    check(killed, undisturbed)
