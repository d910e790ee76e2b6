"""Trains and compares every row of the paper's Table 1 at equal compute, with one command.

  python -m shortcut_jax.table1 --config=configs/digits.py --workdir=runs/table1 --seeds=3

In WORKDIR: seed_S/ROW is the run of a row, seed_S/teacher the flow-matching model that the
two-phase rows learn from; table1.{md,json}, curves.png and samples.png are written anew after each
row. Started again it continues where it stopped. Two processes may work on different --rows of one
workdir, once the teachers are there.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags, logging

from shortcut_jax import cli, config_flag
from shortcut_jax.errors import UserError

SEEDS = flags.DEFINE_integer("seeds", 1, "Train every row with the seeds 0, 1 ... SEEDS-1.", 1)
ROWS = flags.DEFINE_list("rows", [], "Objectives to train; all if not given.")
TEACHER_SHARE = flags.DEFINE_float(
    "teacher_share", 0.5, "Part of a two-phase row's compute that its teacher gets.", 0.0, 1.0
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what each row would spend, and stop.")


def main() -> None:
    """Trains what is missing of the table, evaluates it, and writes the table."""
    from shortcut_jax import budget, objectives, table1_report

    workdir = Path(cli.workdir())
    rows = ROWS.value or list(objectives.OBJECTIVES)
    for row in rows:
        if row not in objectives.OBJECTIVES:
            raise UserError(
                f"--rows={','.join(rows)} holds {row}; expected some of "
                f"{', '.join(objectives.OBJECTIVES)}: choose among them."
            )
    teacher = config_flag.with_objective("flow_matching")
    total = per_row_total()
    configs = {row: config_flag.with_objective(row) for row in rows}
    budgets = {
        row: budget.split(total, config, teacher, TEACHER_SHARE.value)
        for row, config in configs.items()
    }
    print(table1_report.budgets({row: budgets[row] for row in rows}))
    if DRY_RUN.value:
        return

    for seed in range(SEEDS.value):
        folder = workdir / f"seed_{seed}"
        for row in rows:
            if (folder / row / ROW_FILE).exists():
                continue
            spent, config = budgets[row], configs[row]
            if spent.teacher_updates:
                train_row(teacher, folder / "teacher", seed, spent.teacher_updates)
                config.teacher = str(folder / "teacher")
            train_row(config, folder / row, seed, spent.updates)
            evaluate_row(config, folder / row, row, seed, spent)
            table1_report.write(workdir)
    table1_report.write(workdir)
    print((workdir / "table1.md").read_text())


ROW_FILE = "row.json"  # in the workdir of a row that is done


def per_row_total() -> float:
    """Network evaluations that the shortcut model of the config takes."""
    from shortcut_jax import budget

    shortcut = config_flag.with_objective("shortcut")
    return shortcut.total_steps * budget.per_update(shortcut)


def train_row(config: Any, workdir: Path, seed: int, updates: int) -> None:
    """Trains to the end, or does nothing if that was done."""
    from shortcut_jax import run, train

    config.seed, config.total_steps, config.eval.every = seed, updates, 0
    if not (workdir / run.FINISHED).exists():
        logging.info("Training %s.", workdir)
        train.train(config, workdir)


def evaluate_row(config: Any, workdir: Path, row: str, seed: int, spent: Any) -> None:
    """Measures a trained row and writes down all the table needs of it."""
    import dataclasses

    import jax
    import numpy as np

    from shortcut_jax import evaluation, run
    from shortcut_jax.logs import write_atomically

    found = evaluation.evaluate_checkpoint(run.prepare(config), workdir, config.total_steps)
    evaluation.report(workdir, found)
    if jax.process_index() == 0:
        arrays: dict[str, Any] = {str(n): images for n, images in found.samples.items()}
        np.savez(workdir / "samples.npz", **arrays)
        done = {
            "row": row,
            "seed": seed,
            "budget": dataclasses.asdict(spent) | {"total": spent.total},
            "data": config.data.name,
            "records": found.records,
        }
        write_atomically(workdir / ROW_FILE, json.dumps(done, indent=1).encode())


if __name__ == "__main__":
    config_flag.main(main)
