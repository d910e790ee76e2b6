"""What every row of Table 1 would cost, extrapolated from its FLOPs: docs/cost.md.

python -m shortcut_jax.planning.cost > docs/cost.md

Run from the top of the repository, whose configs it reads. No accelerator was measured: what part
of its peak a chip reaches (MFU) is an assumption, --mfu.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict

from shortcut_jax import cli, config_flag, run, sampling
from shortcut_jax import config as config_lib
from shortcut_jax.comparison import budget, paper_results
from shortcut_jax.errors import UserError
from shortcut_jax.planning import chips, flops
from shortcut_jax.planning.chips import CHIPS, Chip

MFU = flags.DEFINE_float("mfu", 0.4, "Part of a chip's peak that is reached.", 0.0, 1.0)
TEACHER_SHARE = flags.DEFINE_float(
    "teacher_share", 0.5, "As --teacher_share of shortcut_jax.table1.", 0.0, 1.0
)

OTHER_MFUS = (0.3, 0.4, 0.5)
# data set of Table 1 -> config file, images of its training split (docs/data.md, and
# https://www.tensorflow.org/datasets/catalog/imagenet2012).
DATASETS = {
    "CelebA-HQ-256": ("configs/celebahq.py", 30_000),
    "ImageNet-256": ("configs/imagenet.py", 1_281_167),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs, apart by what they are computed in.

    Attributes:
      network: of the diffusion transformer, in bfloat16.
      exact: of the autoencoder and of Inception, in float32.
    """

    network: float = 0.0
    exact: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.network + self.exact


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      dataset: "ImageNet-256" or "CelebA-HQ-256".
      name: of the method, and of the size where it is not B/2.
      spent: network evaluations of training.
      training: teacher and pairs included, each row paying for its own teacher.
      evaluation: sampling steps -> what FID-50k takes.
    """

    dataset: str
    name: str
    spent: budget.Budget
    training: Work
    evaluation: dict[int, Work]


def chip_hours(work: Work, chip: Chip, mfu: float) -> float:
    """Hours of one chip, or of N chips together."""
    return (work.network / chip.peak + work.exact / chip.peak_float32) / mfu / 3600


def rows(teacher_share: float) -> Iterator[Row]:
    """Every row of Table 1 on both data sets, at the equal compute of `shortcut_jax.table1`, then
    the shortcut model of XL/2."""
    for dataset, (file, _) in DATASETS.items():
        shortcut, teacher = _load(file, "shortcut"), _load(file, "flow_matching")
        total = shortcut.total_steps * budget.per_update(shortcut)
        for name in paper_results.TABLE_1:
            config = _load(file, name)
            spent = budget.split(total, config, teacher, teacher_share)
            yield _row(dataset, name, config, spent)
    config = config_flag.load("configs/imagenet.py:xl")
    spent = budget.Budget(config.total_steps, budget.per_update(config))
    yield _row("ImageNet-256", "shortcut, XL/2", config, spent)


def encoding(images: int) -> Work:
    """Of encoding each image and its mirror image once."""
    return Work(exact=2 * images * _encoder())


def _load(file: str, objective: str) -> ConfigDict:
    return config_flag.load(f"{file}:objective={objective}")


def _row(dataset: str, name: str, config: ConfigDict, spent: budget.Budget) -> Row:
    shape, classes = run.check(config)
    forward = flops.forward(config.model, shape)
    objective = config_lib.build_objective(config, classes)
    evaluation = {}
    for steps in paper_results.STEPS:
        guided = sampling.is_guided(objective, objective.cfg_scale, steps)
        samples = config.eval.num_samples
        evaluation[steps] = Work(
            network=samples * steps * (1 + guided) * forward,
            exact=samples * (_decoder() + _inception()),
        )
    return Row(dataset, name, spent, Work(network=spent.total * forward), evaluation)


# ---------------------------------------------------------------------- networks beside it


@functools.cache
def _encoder() -> float:
    """FLOPs of encoding an image of 256x256, as XLA counts them before it compiles."""
    return _autoencoder("encode", (1, 256, 256, 3))


@functools.cache
def _decoder() -> float:
    """FLOPs of decoding one."""
    return _autoencoder("decode", (1, 32, 32, 4))


def _autoencoder(direction: str, shape: Sequence[int]) -> float:
    import jax
    import jax.numpy as jnp

    from shortcut_jax.models import autoencoder

    network = autoencoder.Autoencoder(autoencoder.SD)
    image = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), image)["params"])
    return flops.counted(
        getattr(autoencoder, direction), params, jax.ShapeDtypeStruct(shape, jnp.float32)
    )


@functools.cache
def _inception() -> float:
    """FLOPs of Inception-v3 for an image."""
    import jax
    import jax.numpy as jnp

    from shortcut_jax.metrics import inception

    network = inception.InceptionV3()
    image = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    return flops.counted(network.apply, variables, image)


# ---------------------------------------------------------------------- the page


def _mfu_of_dit() -> float:
    """What DiT-XL/2 reached: 5.7 updates of 256 rows a second on a TPU v3-256, of 128 chips."""
    config = config_flag.load("configs/imagenet.py:xl,objective=flow_matching")
    flop = 3 * 256 * flops.forward(config.model, run.check(config)[0])
    return 5.7 * flop / (128 * 123e12)  # https://docs.cloud.google.com/tpu/docs/v3


def page(mfu: float, teacher_share: float) -> str:
    """docs/cost.md."""
    found = list(rows(teacher_share))
    shortcuts = [row for row in found if row.name.startswith("shortcut")]
    names = [chip.name for chip in CHIPS]
    money = [f"{name}: hours, $" for name in names]
    parts = [
        HEADER.format(mfu=mfu, share=teacher_share, read=chips.READ, dit=_mfu_of_dit()),
        "## Chips",
        _table(
            ["chip", "bf16, TFLOP/s", "float32, TFLOP/s", "$ an hour", "spot", "place, type"],
            [
                [
                    f"[{c.name}]({c.source})",
                    f"{c.peak / 1e12:g}",
                    f"{c.peak_float32 / 1e12:.3g}",
                    f"[{c.price:.2f}]({c.price_source})",
                    f"{c.spot:.2f}",
                    c.place,
                ]
                for c in CHIPS
            ],
        ),
        f"## Training, at {mfu:.0%} of the peak",
        TRAINING,
        _table(
            ["data set", "row", "updates", "of its teacher", "EFLOP", *money],
            [
                [
                    row.dataset,
                    row.name,
                    f"{row.spent.updates:,}",
                    f"{row.spent.teacher_updates:,}" if row.spent.teacher_updates else "-",
                    _number(row.training.network / 1e18),
                    *(_cell(row.training, chip, mfu) for chip in CHIPS),
                ]
                for row in found
            ],
        ),
        f"## FID-50k, at {mfu:.0%} of the peak",
        EVALUATION.format(decoder=_number(_decoder() / 1e9), inception=_number(_inception() / 1e9)),
        _table(
            ["data set", "row", *(f"EFLOP at {n}" for n in paper_results.STEPS), *money],
            [
                [
                    row.dataset,
                    row.name,
                    *(_number(work.total / 1e18) for work in row.evaluation.values()),
                    *(_cell(_sum(row.evaluation.values()), chip, mfu) for chip in CHIPS),
                ]
                for row in found
            ],
        ),
        f"## Encoding the images once, at {mfu:.0%} of the peak",
        ENCODING.format(encoder=_number(_encoder() / 1e9)),
        _table(
            ["data set", "images", "EFLOP", *money],
            [
                [
                    dataset,
                    f"{images:,}",
                    _number(encoding(images).total / 1e18),
                    *(_cell(encoding(images), chip, mfu) for chip in CHIPS),
                ]
                for dataset, (_, images) in DATASETS.items()
            ],
        ),
        "## If another part of the peak is reached",
        "Training of the shortcut model.",
        _table(
            ["data set", "row", "MFU", *money],
            [
                [
                    row.dataset,
                    row.name,
                    f"{other:.0%}",
                    *(_cell(row.training, chip, other) for chip in CHIPS),
                ]
                for row in shortcuts
                for other in OTHER_MFUS
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


HEADER = """\
# What the table would cost

Extrapolated, not measured: no accelerator was to be had where this was developed, and no run of
these sizes was made. `python -m shortcut_jax.planning.cost > docs/cost.md` works it out anew
(`shortcut_jax/planning/cost.py`; peaks and prices are in `shortcut_jax/planning/chips.py`).

    chip-hours = FLOPs / (peak x MFU) / 3600          money = chip-hours x price

- **FLOPs** are those of matrix products, nothing computed twice
  (`shortcut_jax/planning/flops.py`); with `model.remat` a step does up to a third more.
- **MFU**, the part of the peak that is reached, is assumed: {mfu:.0%}. It is the largest unknown;
  other values are at the end, and it may well be less where a chip has few rows. The authors of
  DiT reached {dit:.0%}: 5.7 updates a second of DiT-XL/2 on 128 chips of v3, 2 rows on each
  ([arXiv 2212.09748](https://arxiv.org/abs/2212.09748)). Measured speed replaces it:
  [pods.md](pods.md), "Cost".
- **Updates** are those of the configs, and of the other rows of equal compute, as
  `shortcut_jax.table1` splits it ({share:.0%} for a teacher); how the paper split it is not known.
- **Prices** are list prices in US dollars for a chip-hour,
  {read}. They differ by place and change, spot prices within
  days; other clouds asked up to twice as much for an H100
  ([a list of March 2026](https://costnimbus.com/article/gpu-cost-management-ml-teams)).
- **Not counted**: loading data, checkpoints, compiling, pictures, what preemptions repeat, storage,
  hosts beyond what comes with a chip, slices that wait, and every run that goes wrong. A machine
  has 4 or 8 chips at least. Whether a batch of 64 or 256 keeps many chips busy is another question:
  [scaling.md](scaling.md).

Cells are chip-hours, then dollars on demand / spot."""

TRAINING = """\
The rows of a data set cost the same by design, up to one update. Each pays here for a teacher of
its own; `shortcut_jax.table1` trains one for the three rows with a teacher."""

EVALUATION = """\
50,000 samples at each number of steps of the paper's table; the configs ask for 2, 8, 16, 32 and 64
steps, too. A guided step passes the network twice. The decoder ({decoder} GFLOP an image) and
Inception ({inception} GFLOP) work in float32 and are most of it in few steps; peaks in float32 are
those above. The last columns are for the three numbers of steps together."""

ENCODING = """\
Each image and its mirror image through the encoder ({encoder} GFLOP an image, float32), before
training."""


def _cell(work: Work, chip: Chip, mfu: float) -> str:
    hours = chip_hours(work, chip, mfu)
    return f"{_number(hours)} h, {_number(hours * chip.price)} / {_number(hours * chip.spot)}"


def _sum(works: Iterable[Work]) -> Work:
    works = list(works)
    return Work(sum(w.network for w in works), sum(w.exact for w in works))


def _number(value: float) -> str:
    """Three digits that count: 1,230 or 12.3 or 0.0123."""
    rounded = float(f"{value:.3g}")
    digits = max(2 - math.floor(math.log10(rounded)), 0) if rounded else 0
    return f"{rounded:,.{digits}f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    """Prints the page."""
    if not MFU.value:
        raise UserError(
            "--mfu=0.0 is a chip that does nothing; expected a part above 0, such as 0.4: raise it."
        )
    print(page(MFU.value, TEACHER_SHARE.value), end="")


if __name__ == "__main__":
    cli.main(main)
