"""Evaluation of the checkpoints of a run, from its workdir."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from shortcut_jax import checkpoint, data, parameters, run
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation.grid import Cell, Grid, cells, check_grid
from shortcut_jax.evaluation.measuring import Evaluation, Evaluator
from shortcut_jax.evaluation.partial import FOLDER
from shortcut_jax.evaluation.sample_files import Sinks


class RunEvaluator:
    """Evaluates checkpoints of a run; reference and networks are loaded once.

    Args:
      setup: from `run.prepare`.
      workdir: of the run.
      grid: steps, parameters and guidance.

    Raises:
      UserError: the model does not have what the grid asks for.
    """

    def __init__(self, setup: run.Setup, workdir: str | os.PathLike[str], grid: Grid) -> None:
        check_grid(setup, grid)
        self._setup, self._grid = setup, grid
        self._partial = Path(workdir) / "eval" / FOLDER
        keep = setup.config.checkpoint.keep
        self._checkpoints = checkpoint.Checkpoints(workdir, keep=keep, read_only=True)
        self._evaluator: Evaluator | None = None

    def evaluate(self, step: int, sink: Sinks | None = None) -> Evaluation:
        """Samples from a checkpoint in all the ways of the grid, and measures.

        Killed and called again, it goes on where it was: see `shortcut_jax.evaluation.partial`.

        Args:
          step: of the checkpoint.
          sink: see `Evaluator.run`.

        Raises:
          UserError: data, statistics or checkpoint cannot be read, or lack what is asked for.
        """
        ways = cells(self._setup, self._grid)
        for which in dict.fromkeys(cell.params for cell in ways):
            parameters.check(self._checkpoints, step, which)
        when = self._written_at(step)
        parts = []
        for which, of_params in itertools.groupby(ways, lambda cell: cell.params):
            params, shardings = run.restore_params(self._setup, self._checkpoints, step, which)
            logging.info("Evaluating the %s parameters of step %d.", which, step)
            mine = list(of_params)
            evaluator = self._evaluator or self._start(params, shardings, mine)
            found = evaluator.run(
                params,
                step,
                mine,
                partial=self._partial / str(step),
                identity={"checkpoint": when},
                sink=sink,
            )
            parts.append(found)
            del params  # before the next are read
        return Evaluation(
            step,
            [record for part in parts for record in part.records],
            {cell: images for part in parts for cell, images in part.samples.items()},
        )

    def _written_at(self, step: int) -> int:
        path = self._checkpoints.directory / str(step)
        try:
            return path.stat().st_mtime_ns
        except OSError as error:  # a run that goes on keeps its newest alone
            raise UserError(
                f"{path} cannot be read ({error}); expected a finished checkpoint: take another."
            ) from error

    def _start(self, params: Any, shardings: Any, ways: Sequence[Cell]) -> Evaluator:
        """Everything that can fail, before the long part."""
        section = self._setup.config.eval
        reads = section.metrics and not section.get("reference", "")
        images = data.open_dataset(self._setup.config.data) if reads else None
        self._evaluator = Evaluator(self._setup, images, shardings)
        self._evaluator.compared_with()
        self._evaluator.try_out(params, ways)
        return self._evaluator


def evaluate_checkpoint(
    setup: run.Setup,
    workdir: str | os.PathLike[str],
    step: int,
    grid: Grid = Grid(),  # noqa: B008 (it cannot be changed)
    sink: Sinks | None = None,
) -> Evaluation:
    """Evaluates one checkpoint of a run: see `RunEvaluator`."""
    return RunEvaluator(setup, workdir, grid).evaluate(step, sink)
