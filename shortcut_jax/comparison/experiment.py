"""One trained and measured run of a comparison; `table1` and `ablations` are lists of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from shortcut_jax import config as config_lib
from shortcut_jax import run, train
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import of_runs, reports
from shortcut_jax.evaluation.reports import metric_name
from shortcut_jax.files import read_json, write_atomically
from shortcut_jax.parallel import distributed

RESULT = "result.json"  # in the workdir of an experiment that is done


def check(config: ConfigDict) -> None:
    """As `run.check`, and refuses a config of one seed or that measures nothing (UserError)."""
    run.check(config)
    if config.seed:
        raise UserError(
            f"seed={config.seed} is set, but the runs of a comparison have the seeds 0, 1 ... "
            "SEEDS-1; expected it to be 0: leave it out, and say how many with --seeds."
        )
    if not config.eval.metrics:
        raise UserError(
            "eval.metrics is empty, so that nothing is compared; expected a metric of these "
            "images: set it in the config file or with --config.eval.metrics."
        )


def train_once(config: ConfigDict, workdir: Path) -> None:
    """Trains to the end without evaluations on the way, or does nothing if that was done."""
    config.eval.every = 0
    _refuse_another_length(config, workdir)
    finished = distributed.of_process_0(run.finished_step(workdir))
    if finished is not None:
        run.claim_workdir(config, workdir)  # refuses another config
    if finished != config.total_steps:
        logging.info("Training %s.", workdir)
        train.train(config, workdir)


def _refuse_another_length(config: ConfigDict, workdir: Path) -> None:
    """A run may go on for longer, but its RESULT, or what was taught by it, is of the old length.

    Raises:
      UserError: the run in the workdir has another number of updates.
    """
    path = workdir / "config.json"
    there = run.read_config(workdir).get("total_steps") if path.exists() else config.total_steps
    if there != config.total_steps:
        raise UserError(
            f"{path} is of a run of total_steps={there}, which this comparison would give "
            f"{config.total_steps}; expected the same number: ask for what it was begun with "
            "(total_steps, --teacher_share), or use another --workdir; nothing was changed."
        )


def perform(config: ConfigDict, workdir: Path, facts: Mapping[str, Any]) -> None:
    """Trains, evaluates the last checkpoint in all of `config.eval.steps`, and writes RESULT.

    Args:
      config: of the run.
      workdir: of the run; one with a RESULT by the same evaluation is left as it is.
      facts: JSON data that goes into RESULT beside the records: "name", "seed" and more.
    """
    config.eval.every = 0  # the curve at the end is what is compared
    flat = config_lib.flatten(config)
    if distributed.of_process_0((workdir / RESULT).exists()):
        _refuse_another_length(config, workdir)
        run.claim_workdir(config, workdir)  # refuses another config
        if _same_evaluation(read_json(workdir / RESULT, "the result of an experiment"), flat):
            return
    train_once(config, workdir)
    found = of_runs.evaluate_checkpoint(run.prepare(config), workdir, config.total_steps)
    reports.report(workdir, found)
    if jax.process_index() == 0:
        arrays: dict[str, Any] = {str(c.num_steps): images for c, images in found.samples.items()}
        np.savez(workdir / "samples.npz", **arrays)
        result = {**facts, "config": flat, "records": found.records}
        write_atomically(workdir / RESULT, json.dumps(result, indent=1).encode())


# metric -> name of the experiment -> number of sampling steps -> values, one for each seed
Values = dict[str, dict[str, dict[str, list[float]]]]


def values(results: Sequence[Mapping[str, Any]]) -> Values:
    """What several RESULTs measured; JSON data, so numbers of steps are text."""
    found: Values = {}
    for result in results:
        for record in result["records"]:
            by_steps = found.setdefault(metric_name(record), {}).setdefault(result["name"], {})
            by_steps.setdefault(str(record["sampling_steps"]), []).append(record["value"])
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and, with several seeds, half the range between the smallest and the largest."""
    if not values:
        return ""
    mean = f"{np.mean(values):.3g}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else mean


def results(workdir: Path, config: ConfigDict) -> list[dict[str, Any]]:
    """The RESULTs in WORKDIR/seed_*/* that were measured as `config` says, by path.

    Others are left out until they are measured again: numbers of different protocols are never in
    one table.
    """
    flat = config_lib.flatten(config)
    paths = sorted(workdir.glob(f"seed_*/*/{RESULT}"))
    found = [read_json(path, "the result of an experiment") for path in paths]
    return [result for result in found if _same_evaluation(result, flat)]


def _same_evaluation(result: Mapping[str, Any], flat: Mapping[str, Any]) -> bool:
    there = config_lib.with_defaults(result["config"])  # an older version may lack keys
    return all(
        there.get(key) == flat[key]
        for key in flat
        if key.startswith("eval.") and key != "eval.every"
    )
