"""Trains: python -m shortcut_jax.main --config=configs/digits.py --workdir=runs/digits."""

from pathlib import Path

from absl import flags

from shortcut_jax import config_flag, workdir_flag
from shortcut_jax.errors import UserError

DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved config, parameters, mesh and batch per device, and stop."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --dry_run: compile the step for another machine, e.g. v5e:4x4 or cpu:8."
)
REPORT = flags.DEFINE_string(
    "report", None, "With --topology: a JSON file to keep the figures in, beside those of others."
)


def main() -> None:
    """Trains, or resumes: the command is the same."""
    # after the flags: a wrong one should fail at once
    from shortcut_jax import averages, pretrained, run, train

    if REPORT.value is not None and TOPOLOGY.value is None:
        raise UserError(
            f"--report={REPORT.value} keeps what --topology finds, which is not given; expected "
            "both: add --topology=v5e:4x4, for example, or leave out --report."
        )
    if TOPOLOGY.value is not None:
        compile_for(TOPOLOGY.value)
    elif DRY_RUN.value:
        config = config_flag.CONFIG.value
        pretrained.find(config)
        averages.check_tracked(config)
        print(run.summary(run.prepare(config, measures=config.eval.every > 0)))
    else:
        train.train(config_flag.CONFIG.value, workdir_flag.workdir())


def compile_for(name: str) -> None:
    """Prints what --dry_run --topology=NAME asks for."""
    from shortcut_jax.planning import topology, topology_table

    if not DRY_RUN.value:
        raise UserError(
            f"--topology={name} is of a machine to compile for, which does not train; "
            "expected --dry_run with it: add that, or leave it out."
        )
    report = topology.compile_for(config_flag.CONFIG.value, topology.find_machine(name))
    print(report.text())
    if REPORT.value:
        topology_table.add(Path(REPORT.value), report)


if __name__ == "__main__":
    config_flag.main(main)
