"""Evaluates: samples, statistics of references, and the numbers that compare them.

  python -m shortcut_jax.eval run    --config=configs/digits.py --workdir=runs/digits
  python -m shortcut_jax.eval follow --config=configs/digits.py --workdir=runs/digits
  python -m shortcut_jax.eval sample --config=configs/digits.py --workdir=runs/digits --steps=4 \\
      --out=s.npz
  python -m shortcut_jax.eval ref    --config=configs/digits.py --out=ref.npz
  python -m shortcut_jax.eval calc   --images=s.npz --reference=ref.npz --metrics=fd_digits

`run` is meant where no verb is given. docs/metrics.md explains them.
"""

import pkgutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags

from shortcut_jax import cli, config_flag, workdir_flag  # noqa: F401 (defines --workdir)
from shortcut_jax.errors import UserError

STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest if not given.")
STEPS = flags.DEFINE_list(
    "steps", [], "Numbers of sampling steps, e.g. 1,4,128; eval.steps if not given."
)
PARAMS = flags.DEFINE_list("params", [], "Parameters, e.g. ema,online; eval.params if not given.")
CFG_SCALES = flags.DEFINE_list(
    "cfg_scales", [], "Scales of guidance, where it is applied while sampling; else the trained."
)
SAVE_SAMPLES = flags.DEFINE_string(
    "save_samples", None, "Write all samples here too: see --out of sample."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check, print what would be done, and stop.")
OUT = flags.DEFINE_string(
    "out",
    None,
    "sample: an .npz with arr_0 (images NHWC) and arr_1 (labels), or a folder of PNG files; with "
    "several ways to sample one each, NAME_4.npz. ref: the .npz to write. calc: JSON to write.",
)
POLL = flags.DEFINE_float("poll_seconds", 30.0, "Time between two looks for checkpoints.", 0.01)
GIVE_UP = flags.DEFINE_float(
    "give_up_after", 0.0, "End with an error after so many seconds without one; 0 = never.", 0.0
)
IMAGES = flags.DEFINE_string(
    "images",
    None,
    "Folder, zip or .npz of images. ref: also an .npz with mu and sigma of ADM, pytorch-fid or the "
    "authors.",
)
REFERENCE = flags.DEFINE_string(
    "reference", None, "A file made by ref, or a folder, zip or .npz of images."
)
METRICS = flags.DEFINE_list("metrics", ["fid"], "Names of metrics: fid, sfid, is, kid, ...")
PROTOCOLS = flags.DEFINE_list(
    "protocols", [], "How images are prepared: adm (if not given), pytorch_fid, clean, authors, ..."
)
INCEPTION_WEIGHTS = flags.DEFINE_string("inception_weights", "", "As eval.inception_weights.")
INCEPTION_SHA256 = flags.DEFINE_string("inception_sha256", "", "As eval.inception_sha256.")
DINOV2_WEIGHTS = flags.DEFINE_string("dinov2_weights", "", "As eval.dinov2_weights.")
DINOV2_SHA256 = flags.DEFINE_string("dinov2_sha256", "", "As eval.dinov2_sha256.")
ALLOW_SMALL_N = flags.DEFINE_bool("allow_small_n", False, "Measure fewer images than is sensible.")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Of the images behind mu and sigma, which do not tell.", 1
)
NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "How many images are behind mu and sigma, if known.", 1
)


class Verb(NamedTuple):
    """What a verb is.

    Attributes:
      function: MODULE.NAME of it in `shortcut_jax.evaluation`.
      config: whether it needs --config ("yes"), may have one ("may") or has none ("no").
      takes: the flags of this module that it has.
    """

    function: str
    config: str
    takes: tuple[flags.FlagHolder, ...]


_GRID = (STEPS, PARAMS, CFG_SCALES)
_WEIGHTS = (INCEPTION_WEIGHTS, INCEPTION_SHA256, DINOV2_WEIGHTS, DINOV2_SHA256)
_NETWORKS = (METRICS, PROTOCOLS, ALLOW_SMALL_N, *_WEIGHTS)
VERBS = {
    "run": Verb("verbs.run_", "yes", (STEP, *_GRID, SAVE_SAMPLES, DRY_RUN)),
    "follow": Verb("verbs.follow", "yes", (*_GRID, POLL, GIVE_UP, DRY_RUN)),
    "sample": Verb("verbs.sample", "yes", (STEP, *_GRID, OUT, DRY_RUN)),
    "ref": Verb(
        "verbs_of_sets.ref", "may", (IMAGES, IMAGE_SIZE, NUM_IMAGES, *_NETWORKS, OUT, DRY_RUN)
    ),
    "calc": Verb("verbs_of_sets.calc", "no", (IMAGES, REFERENCE, *_NETWORKS, OUT, DRY_RUN)),
}
_OWN = {holder.name for verb in VERBS.values() for holder in verb.takes}


def parse(argv: Sequence[str]) -> list[str]:
    """Parses PROGRAM [VERB] --flag=value ...; returns PROGRAM and the verb."""
    named = len(argv) > 1 and not argv[1].startswith("-")
    name = argv[1] if named else "run"
    rest = [argv[0], *argv[2 if named else 1 :]]
    if name not in VERBS:
        cli.fail(f"{name!r} is not a verb; expected one of {', '.join(VERBS)}, and flags after it.")
    verb = VERBS[name]
    has_config = any(a.lstrip("-").startswith("config") for a in rest[1:])
    if verb.config == "yes" or (verb.config == "may" and has_config):
        config_flag.parse(rest)
    else:
        cli.parse_flags(rest)
    return [argv[0], name]


def main(name: str) -> None:
    """Does what a verb says."""
    config_flag.join()
    verb = VERBS[name]
    for flag in sorted(_OWN - {holder.name for holder in verb.takes}):
        if flags.FLAGS[flag].present:
            fitting = [n for n, v in VERBS.items() if flag in {h.name for h in v.takes}]
            raise UserError(
                f"--{flag} is given, but {name} has no such flag; expected it with "
                f"{' or '.join(fitting)}: leave it out."
            )
    if verb.config == "no" and flags.FLAGS["config"].present:
        raise UserError(f"--config is given, but {name} needs none; leave it out.")
    function: Callable[[], None] = pkgutil.resolve_name(f"shortcut_jax.evaluation.{verb.function}")
    function()


if __name__ == "__main__":
    cli.main(main, parse)
