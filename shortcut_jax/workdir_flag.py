"""The flag --workdir of the binaries that have one."""

from absl import flags

from shortcut_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def workdir() -> str:
    """--workdir.

    Raises:
      UserError: it is missing.
    """
    if not WORKDIR.value:
        raise UserError("--workdir is missing; give the folder of the run, e.g. --workdir=runs/a.")
    return WORKDIR.value
