"""Evaluation of the checkpoints of a run."""

import shutil

import pytest

from shortcut_jax import run
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import grid, of_runs
from tests.sentences import assert_sentence
from tests.untrained_runs import save_run, small


def test_a_checkpoint_that_was_replaced_meanwhile_is_a_sentence(tmp_path):
    """Which `follow` goes on after; it lists checkpoints before it takes minutes for the first."""
    config = small("flow_matching")
    save_run(tmp_path, config, steps=(2, 4))
    evaluator = of_runs.RunEvaluator(run.prepare(config), tmp_path, grid.Grid((1,)))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError) as error:
        evaluator.evaluate(2)
    assert_sentence(str(error.value), (str(tmp_path / "checkpoints" / "2"), "cannot be read"))
