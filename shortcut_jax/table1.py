"""Trains and compares every row of the paper's Table 1 at equal compute, with one command.

  python -m shortcut_jax.table1 --config=configs/digits.py --workdir=runs/table1 --seeds=3

In WORKDIR: seed_S/ROW is the run of a row, seed_S/teacher the flow-matching model that the
two-phase rows learn from; table1.{md,json}, curves.png and samples.png are written anew after each
row. Started again it continues where it stopped. Two processes may work on different --rows of one
workdir, once the teachers are there.
"""

import dataclasses
from pathlib import Path

from absl import flags

from shortcut_jax import config_flag, workdir_flag
from shortcut_jax.errors import UserError

SEEDS = flags.DEFINE_integer("seeds", 1, "Train every row with the seeds 0, 1 ... SEEDS-1.", 1)
ROWS = flags.DEFINE_list("rows", [], "Objectives to train; all if not given.")
TEACHER_SHARE = flags.DEFINE_float(
    "teacher_share", 0.5, "Part of a two-phase row's compute that its teacher gets.", 0.0, 1.0
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what each row would spend, and stop.")


def main() -> None:
    """Trains what is missing of the table, evaluates it, and writes the table."""
    from shortcut_jax import objectives, run, validation
    from shortcut_jax.comparison import budget, experiment, table1_report
    from shortcut_jax.parallel import distributed

    workdir = Path(workdir_flag.workdir()).absolute()  # teachers are named by it
    rows = ROWS.value or list(objectives.OBJECTIVES)
    for row in rows:
        if row not in objectives.OBJECTIVES:
            raise UserError(
                f"--rows={','.join(rows)} holds {row}; expected some of "
                f"{', '.join(objectives.OBJECTIVES)}: choose among them."
            )
    shortcut = config_flag.with_objective("shortcut")
    total = shortcut.total_steps * budget.per_update(shortcut)
    teacher = config_flag.with_objective("flow_matching")
    configs = {row: config_flag.with_objective(row) for row in rows}
    budgets = {
        row: budget.split(total, config, teacher, TEACHER_SHARE.value)
        for row, config in configs.items()
    }
    print(table1_report.budgets(budgets))
    validation.check_teacher(shortcut)  # the table trains its own
    for row, config in configs.items():  # all of them, before hours go into the first
        config.total_steps = budgets[row].updates
        experiment.check(config)
        if budgets[row].teacher_updates:
            teacher.total_steps = budgets[row].teacher_updates
            run.check(teacher)
    if DRY_RUN.value:
        return

    for seed in range(SEEDS.value):
        folder = workdir / f"seed_{seed}"
        for row, config in configs.items():
            spent = budgets[row]
            if spent.teacher_updates:
                teacher.update(seed=seed, total_steps=spent.teacher_updates)
                experiment.train_once(teacher, folder / "teacher")
                config.teacher = str(folder / "teacher")
            config.seed = seed
            facts = {"name": row, "seed": seed, "budget": dataclasses.asdict(spent)}
            experiment.perform(config, folder / row, facts)
            if distributed.writes():
                table1_report.write(workdir, config)
    if distributed.writes():
        print((workdir / "table1.md").read_text())


if __name__ == "__main__":
    config_flag.main(main)
