"""Turns a folder or zip of images into a data set that data.name=images reads; docs/data.md.

python -m shortcut_jax.prepare --source=imagenet/train --name=my_imagenet --workers=16
python -m shortcut_jax.prepare --source=celeba_hq_256.zip --name=celebahq --preset=celebahq

Every image is decoded to see that it can be, and stored as it is. The same command goes on where a
killed one stopped. Images come in the order of their paths, however many processes work.
"""

from pathlib import Path

from absl import flags

from shortcut_jax import cli
from shortcut_jax.errors import UserError

SOURCE = flags.DEFINE_string("source", None, "Folder or zip file with the images.")
INSIDE = flags.DEFINE_string("inside", "", "Use only this folder inside the source.")
NAME = flags.DEFINE_string("name", None, "Name of the data set, for data.builder.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where it is written. (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
)
SPLIT = flags.DEFINE_string("split", "train", "Split to write; one command for each.")
LABELS = flags.DEFINE_string(
    "labels",
    None,
    "folders: the first folder is the class; none: one class; or a file, JSON or CSV, on disk or in"
    " the source. (default: folders)",
)
COUNT = flags.DEFINE_integer("count", None, "Number of images that must be there.")
PRESET = flags.DEFINE_enum(
    "preset", None, ["celebahq"], "celebahq: one class, and as many images as CelebA-HQ has."
)
WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes; 0 works in this one. (default: one for each CPU, of a large zip fewer)",
)
ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt", "stop", ["stop", "skip"], "What images that cannot be decoded do, at the end."
)

# In all, and as some copies are split.
CELEBAHQ_COUNTS = {"train": (30_000, 28_000), "validation": (2_000,), "test": (2_000,)}


def main() -> None:
    """Checks the flags and prepares one split."""
    from shortcut_jax.data import image_files, local_data_dir, preparing

    if not SOURCE.value or not NAME.value:
        raise UserError(
            "--source and --name are needed; expected the folder or zip with the images and the "
            "name to give them: set both, --source=FOLDER --name=my_set."
        )
    labels, counts = labels_and_counts()
    preparing.prepare(
        preparing.Request(
            source=image_files.Source(Path(SOURCE.value).expanduser(), INSIDE.value),
            name=NAME.value,
            split=SPLIT.value,
            data_dir=local_data_dir(DATA_DIR.value, "--data_dir"),
            labels=labels,
            counts=counts,
            workers=WORKERS.value,
            skip_corrupt=ON_CORRUPT.value == "skip",
        )
    )


def labels_and_counts() -> tuple[str, tuple[int, ...]]:
    """Where labels come from, and how many images there may be; () for any number.

    Raises:
      UserError: a preset and what it decides are both given.
    """
    if PRESET.value is None:
        return LABELS.value or "folders", () if COUNT.value is None else (COUNT.value,)
    if COUNT.value is not None or LABELS.value is not None:
        raise UserError(
            f"--preset={PRESET.value} says itself how many images there are and that they have no "
            "labels; expected neither --count nor --labels with it: leave them out."
        )
    if SPLIT.value not in CELEBAHQ_COUNTS:
        raise UserError(
            f"--split={SPLIT.value} is no split of CelebA-HQ; expected one of "
            f"{', '.join(CELEBAHQ_COUNTS)}: change it or leave out --preset."
        )
    return "none", CELEBAHQ_COUNTS[SPLIT.value]


if __name__ == "__main__":
    cli.main(main)
