"""Draws samples of a trained run: a picture, or the arrays.

python -m shortcut_jax.sample --workdir=runs/digits --steps=1,4,128 --labels=0,1,2 --out=grid.png
python -m shortcut_jax.sample --workdir=runs/digits --steps=1 --interpolate=16 --out=strip.png
"""

from pathlib import Path

from absl import flags

from shortcut_jax import cli, workdir_flag
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable
from shortcut_jax.parallel import distributed, distributed_flag, preemption

STEPS = flags.DEFINE_list(
    "steps", [], "Numbers of sampling steps, e.g. 1,4,128; the run's eval.steps if not given."
)
LABELS = flags.DEFINE_list("labels", [], "Classes, one sample each; drawn if not given.")
NUM = flags.DEFINE_integer("num", None, "Number of samples, without --labels. (default: 8)")
SEED = flags.DEFINE_integer("seed", 0, "Of noise and drawn labels: sample i is that of eval.seed.")
OUT = flags.DEFINE_string(
    "out",
    "samples.png",
    "Picture to write (.png), or arrays (.npz): arr_0 uint8 NHWC, arr_1 labels, steps.",
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to load; the newest if not given.")
PARAMS = flags.DEFINE_string(
    "params", "ema", "Which to load: ema, online, or another average, such as power_0.1."
)
CFG_SCALE = flags.DEFINE_float(
    "cfg_scale", None, "Scale of guidance, where it is applied while sampling; else the trained."
)
AUTOENCODER = flags.DEFINE_string(
    "autoencoder", None, "Weights that decode latents, if not where training had them."
)
INTERPOLATE = flags.DEFINE_integer(
    "interpolate",
    None,
    "Draw this many samples between two noises instead, in a row for each of --steps and --labels.",
)


def main() -> None:
    """Loads the model, checks what is asked for, samples and writes."""
    from shortcut_jax import sampling

    out, workdir = Path(OUT.value), workdir_flag.workdir()
    if out.suffix not in (".png", ".npz") or out.is_dir():
        raise UserError(
            f"--out={out} names neither a .png nor an .npz file; expected one to write: give, for "
            "example, --out=samples.png."
        )
    distributed_flag.start()
    preemption.heed_no_longer()
    steps, labels = whole_numbers(STEPS), whole_numbers(LABELS) or None
    model = sampling.load(workdir, STEP.value, PARAMS.value, AUTOENCODER.value)
    steps = list(dict.fromkeys(steps)) or list(model.setup.config.eval.steps)
    check(model, steps, labels)
    check_writable("--out", out.parent)
    print(f"Sampling with the {PARAMS.value} parameters of step {model.step}.")
    if INTERPOLATE.value is None:
        write_samples(model, steps, labels, out)
    else:
        write_interpolations(model, steps, labels, out)


def whole_numbers(flag: flags.FlagHolder) -> list[int]:
    """The numbers of a list flag (UserError if one is none)."""
    try:
        return [int(text) for text in flag.value]
    except ValueError as error:
        raise UserError(
            f"--{flag.name}={','.join(flag.value)} is not a list of whole numbers; expected them "
            f"separated by commas: give, for example, --{flag.name}=1,4."
        ) from error


def check(model, steps: list[int], labels: list[int] | None) -> None:
    """Refuses what the model cannot be sampled with, before anything is sampled (UserError)."""
    if INTERPOLATE.value is not None and (INTERPOLATE.value < 2 or NUM.value is not None):
        raise UserError(
            f"--interpolate={INTERPOLATE.value} goes with no --num, and is itself the number of "
            "samples in a row; expected at least 2: give, for example, --interpolate=16 alone."
        )
    for num_steps in steps:
        try:
            model.check(
                num_steps, labels, num=NUM.value, seed=SEED.value, cfg_scale=CFG_SCALE.value
            )
        except UserError as error:  # begins with an argument; all but one are named as their flags
            raise UserError(f"--{str(error).removeprefix('num_')}") from error


def write_samples(model, steps: list[int], labels: list[int] | None, out: Path) -> None:
    """A column of samples for each number of steps, from the same noise in each row."""
    from shortcut_jax import pictures, trained

    options = {"num": NUM.value, "seed": SEED.value, "cfg_scale": CFG_SCALE.value}
    samples = {n: model.sample(num_steps=n, labels=labels, **options) for n in steps}
    if not distributed.writes():
        return
    if out.suffix == ".npz":
        drawn = labels or model.labels(NUM.value or trained.DEFAULT_NUM, SEED.value)
        write_arrays(out, [(n, drawn, images) for n, images in samples.items()])
        return
    names = [f"class {label}" for label in labels or []]
    pictures.sample_grid(samples, out, rows=len(samples[steps[0]]), names=names)
    print(f"samples   {out}   rows: the same noise, columns: sampling steps")


def write_interpolations(model, steps: list[int], labels: list[int] | None, out: Path) -> None:
    """A row of samples for each class and number of steps, from the same mixtures of two noises."""
    from shortcut_jax import pictures

    options = {"num": INTERPOLATE.value, "seed": SEED.value, "cfg_scale": CFG_SCALE.value}
    strips, arrays = {}, []
    classes = dict.fromkeys(labels) if labels else [None]
    for label in classes:
        for n in steps:
            images = model.interpolate(label=label, num_steps=n, **options)
            drawn = model.labels(1, SEED.value)[0] if label is None else label
            arrays.append((n, [drawn] * len(images), images))
            name = f"{n} step{'s' * (n > 1)}"
            strips[name if label is None else f"class {label}, {name}"] = images
    if not distributed.writes():
        return
    if out.suffix == ".npz":
        write_arrays(out, arrays)
        return
    pictures.interpolation(strips, out)
    print(f"samples   {out}   columns: n of the noise n a + sqrt(1 - n^2) b")


def write_arrays(out: Path, drawn) -> None:
    """Writes (number of steps, labels [n], images [n, H, W, C]) one after the other."""
    import numpy as np

    images = np.concatenate([images for _, _, images in drawn])
    labels = np.concatenate([labels for _, labels, _ in drawn]).astype(np.int32)
    steps = np.concatenate([np.full(len(images), n, np.int32) for n, _, images in drawn])
    np.savez(out, arr_0=images, arr_1=labels, steps=steps)
    print(f"samples   {out}   arr_0: {len(images)} images, arr_1: labels, steps: sampling steps")


if __name__ == "__main__":
    cli.main(main)
