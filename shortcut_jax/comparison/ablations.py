"""What each switch of the shortcut method is worth: one change at a time, all else equal.

  python -m shortcut_jax.comparison.ablations --config=configs/digits.py \\
      --workdir=runs/ablations --seeds=3

In WORKDIR: seed_S/NAME is a run, ablations.{md,json} is written anew after each. Started again it
continues where it stopped; two processes may work on different --only of one workdir. Every run has
the same number of updates (--config.total_steps), whatever an update costs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import config_flag, workdir_flag
from shortcut_jax.errors import UserError

SEEDS = flags.DEFINE_integer("seeds", 1, "Train each with the seeds 0, 1 ... SEEDS-1.", 1)
ONLY = flags.DEFINE_list("only", [], "Names of ablations to run; all if not given.")

# Name -> overrides of the config. Label dropout needs some dropout to begin with.
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bootstrap_fraction_1_8": {"objective.bootstrap_fraction": 0.125},
    "bootstrap_fraction_1_2": {"objective.bootstrap_fraction": 0.5},
    "stratified_step_sizes": {"objective.step_size_sampling": "stratified"},
    "online_targets": {"objective.bootstrap_params": "online"},
    "no_weight_decay": {"optimizer.weight_decay": 0.0},
    "time_unscaled": {"model.time_scale": 1.0},
    "attention_scale_linear": {"model.attention_scale": "linear"},
    "modulation_xavier": {"model.modulation_init": "xavier"},
    "clip_4": {"objective.bootstrap_clip": 4.0},
    "class_dropout_0.1": {"objective.class_dropout": 0.1},
    "class_dropout_0.1_bootstrap_too": {
        "objective.class_dropout": 0.1,
        "objective.bootstrap_label_dropout": True,
    },
}


def main() -> None:
    """Trains and evaluates what is missing, and writes the comparison."""
    from shortcut_jax.comparison import experiment
    from shortcut_jax.parallel import distributed

    workdir = Path(workdir_flag.workdir())
    names = ONLY.value or list(ABLATIONS)
    for name in names:
        if name not in ABLATIONS:
            raise UserError(
                f"--only={','.join(names)} holds {name}; expected some of {', '.join(ABLATIONS)}: "
                "choose among them."
            )
    configs = {name: config_flag.with_objective("shortcut") for name in names}
    for name, config in configs.items():
        config.update_from_flattened_dict(ABLATIONS[name])
        experiment.check(config)  # all of them, before hours go into the first
    for seed in range(SEEDS.value):
        for name, config in configs.items():
            config.seed = seed
            facts = {"name": name, "seed": seed}
            experiment.perform(config, workdir / f"seed_{seed}" / name, facts)
            if distributed.writes():
                write(workdir, experiment.results(workdir, config))
    if distributed.writes():
        print((workdir / "ablations.md").read_text())


def write(workdir: Path, done: Sequence[Mapping[str, Any]]) -> None:
    """Writes ablations.json and ablations.md."""
    from shortcut_jax.comparison import experiment
    from shortcut_jax.files import write_atomically

    summary = {
        "data": done[0]["config"]["data.name"],
        "total_steps": done[0]["config"]["total_steps"],
        "commit": done[0]["records"][0]["commit"],
        "metrics": experiment.values(done),
    }
    write_atomically(workdir / "ablations.json", json.dumps(summary, indent=1).encode())
    write_atomically(workdir / "ablations.md", markdown(summary).encode())


def markdown(summary: Mapping[str, Any]) -> str:
    """One table for each metric: mean and half the range over seeds, by number of steps."""
    from shortcut_jax.comparison.experiment import spread

    parts = []
    for metric, rows in summary["metrics"].items():
        steps = sorted({int(n) for by_steps in rows.values() for n in by_steps}, reverse=True)
        lines = [
            f"| {metric}, {summary['data']}, {summary['total_steps']:,} updates | "
            + " | ".join(f"{n} steps" for n in steps)
            + " |",
            "|" + "---|" * (len(steps) + 1),
        ]
        for name in ABLATIONS:
            if name in rows:
                cells = [spread(rows[name].get(str(n), [])) for n in steps]
                lines.append(
                    f"| `{name}` ({len(rows[name][str(steps[0])])}) | {' | '.join(cells)} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    config_flag.main(main)
