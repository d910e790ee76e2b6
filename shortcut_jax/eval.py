"""Evaluates a run: python -m shortcut_jax.eval --config=configs/digits.py --workdir=runs/digits."""

from pathlib import Path

from absl import flags, logging

from shortcut_jax import cli, config_flag, workdir_flag
from shortcut_jax.errors import UserError

STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest if not given.")
SAVE_SAMPLES = flags.DEFINE_string(
    "save_samples",
    None,
    "Write all samples to this .npz: arr_0 uint8 NHWC, arr_1 labels. With several numbers of "
    "sampling steps, one file each: NAME_4.npz.",
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be evaluated, and stop.")


def main() -> None:
    """Samples from one checkpoint, measures, and writes results, pictures and samples."""
    import jax

    from shortcut_jax import checkpoint, evaluation, run

    config, workdir = config_flag.CONFIG.value, workdir_flag.workdir()
    samples = Path(SAVE_SAMPLES.value) if SAVE_SAMPLES.value else None
    if samples and (samples.suffix != ".npz" or samples.is_dir()):
        raise UserError(
            f"--save_samples={samples} does not name an .npz file; expected one to write: "
            "give, for example, --save_samples=samples.npz."
        )
    setup = run.prepare(config)
    run.check_workdir_for_evaluation(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, read_only=True)
    step = checkpoints.choose(STEP.value, "--step")
    if DRY_RUN.value:
        print(run.summary(setup))
        print(f"checkpoint           {checkpoints.directory / str(step)}")
        return
    if jax.process_index() == 0:
        cli.check_writable("--workdir", Path(workdir) / "eval")
        if samples:
            cli.check_writable("--save_samples", samples.parent)

    keep = config.eval.num_samples if samples else 0
    found = evaluation.evaluate_checkpoint(setup, workdir, step, keep)
    if samples and jax.process_index() == 0:
        save_samples(samples, found)
    folder = evaluation.report(workdir, found.first_rows(config.eval.grid_rows))
    if folder is not None:
        if found.records:
            print(evaluation.table(found.records), end="\n\n")
        print(f"samples   {folder / 'samples.png'}   rows: the same noise, columns: sampling steps")
        if found.records:
            print(f"curve     {folder / 'curve.png'}   distance against sampling steps")
            print(f"results   {folder.parent / 'results.jsonl'}   every number with its protocol")


def save_samples(path: Path, found) -> None:
    """Writes one .npz per number of sampling steps, in the form the ADM evaluator reads."""
    import numpy as np

    for num_steps, images in found.samples.items():
        several = len(found.samples) > 1
        file = path.with_name(f"{path.stem}_{num_steps}.npz") if several else path
        np.savez(file, arr_0=images, arr_1=found.labels)
        logging.info("Wrote %d samples to %s.", len(images), file)


if __name__ == "__main__":
    config_flag.main(main)
