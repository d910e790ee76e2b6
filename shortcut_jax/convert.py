"""Converts weights: of the paper's authors, of DiT, and to and from safetensors.

python -m shortcut_jax.convert authors FILE --out=runs/theirs [--config=FILE.py:authors_code]
python -m shortcut_jax.convert dit FILE --out=runs/dit [--config=FILE.py:objective=diffusion]
python -m shortcut_jax.convert export runs/digits --out=exported [--step=N] [--params=online]
python -m shortcut_jax.convert import exported --out=runs/again
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from shortcut_jax import cli, config_flag
from shortcut_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "Folder to write: a workdir, or that of the export.")
STEP = flags.DEFINE_integer("step", None, "Of export: checkpoint; the newest if not given.")
PARAMS = flags.DEFINE_string(
    "params", None, "Of export: ema, online or another average. (default: ema)"
)

COMMANDS = {
    "authors": ("FILE",),
    "dit": ("FILE",),
    "export": ("WORKDIR",),
    "import": ("FOLDER",),
}


def main(command: str, source: str) -> None:
    """Runs one command, and says what was written."""
    from shortcut_jax.weights import conversion

    config, path = config_flag.CONFIG.value, Path(source)
    if not OUT.value:
        raise UserError("--out is missing; give the folder to write, e.g. --out=runs/converted.")
    out = Path(OUT.value)
    if config is not None and command not in ("authors", "dit"):
        raise UserError(
            f"--config goes with no {command}, which has a config; expected it with authors or "
            "dit: leave it out."
        )
    if command != "export" and (STEP.value, PARAMS.value) != (None, None):
        raise UserError(
            f"--step and --params go with export, not with {command}; expected neither: leave them "
            "out."
        )
    if command == "export":
        for file in conversion.export(path, out, STEP.value, PARAMS.value or "ema"):
            print(f"written   {file}")
        return
    if command == "import":
        conversion.import_exported(path, out)
    elif command == "authors":
        conversion.import_authors(path, out, config)
    else:
        conversion.import_dit(path, out, config)
    print(f"workdir   {out}   for eval, sample and --config.init_from={out}")


def parse(argv: Sequence[str]) -> list[str]:
    """Takes the command and its argument, then flags; --config may be left out."""
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv):
        return cli.parse_flags(argv)
    try:
        words, rest = cli.split_command(argv, COMMANDS)
    except UserError as error:
        cli.fail(str(error))
    with_config = any(argument.lstrip("-").startswith("config") for argument in rest[1:])
    (config_flag.parse if with_config else cli.parse_flags)(rest)
    return [argv[0], *words]


if __name__ == "__main__":
    cli.main(main, parse)
