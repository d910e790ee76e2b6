"""Trains: python -m shortcut_jax.main --config=configs/digits.py --workdir=runs/digits."""

from absl import flags

from shortcut_jax import cli

DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved config, parameters, mesh and batch per device, and stop."
)


def main() -> None:
    """Trains, or resumes: the command is the same."""
    from shortcut_jax import run, train  # after the flags: a wrong one should fail at once

    if DRY_RUN.value:
        print(run.summary(run.prepare(cli.CONFIG.value)))
    else:
        train.train(cli.CONFIG.value, cli.workdir())


if __name__ == "__main__":
    cli.main(main)
