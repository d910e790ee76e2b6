"""Trains: python -m shortcut_jax.main --config=configs/digits.py --workdir=runs/digits."""

from absl import flags

from shortcut_jax import config_flag, workdir_flag

DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved config, parameters, mesh and batch per device, and stop."
)


def main() -> None:
    """Trains, or resumes: the command is the same."""
    # after the flags: a wrong one should fail at once
    from shortcut_jax import averages, pretrained, run, train

    if DRY_RUN.value:
        config = config_flag.CONFIG.value
        pretrained.find(config)
        averages.check_tracked(config)
        print(run.summary(run.prepare(config, measures=config.eval.every > 0)))
    else:
        train.train(config_flag.CONFIG.value, workdir_flag.workdir())


if __name__ == "__main__":
    config_flag.main(main)
