"""The parameters of a checkpoint or a train state by name: see docs/ema.md for the names."""

from typing import Any

from shortcut_jax import averages, snapshots
from shortcut_jax.checkpoint import Checkpoints
from shortcut_jax.errors import UserError
from shortcut_jax.state import PARAMS_FIELD, TrainState

MAX_ERROR = 0.1  # relative, of the profile of what is reconstructed


def of(train_state: TrainState, name: str) -> Any:
    """The parameters "ema", "online" or of an average that is tracked."""
    if name in PARAMS_FIELD:
        return getattr(train_state, PARAMS_FIELD[name])
    return train_state.averages[name]


def check(
    checkpoints: Checkpoints, step: int, name: str, what: str = "eval.params"
) -> snapshots.Fit | None:
    """Refuses a name under which a checkpoint has no parameters; reads no arrays.

    Args:
      checkpoints: of the run.
      step: one of `checkpoints.steps()`.
      name: "ema", "online", or of an average that is in the checkpoint or, if it is a power
        function, can be reconstructed from snapshots.
      what: the key or argument that gives the name, for the error.

    Returns:
      How to reconstruct it; None if the checkpoint has it.

    Raises:
      UserError: there is no such average, and what would do.
    """
    averages.check_name(name, what)
    if name in PARAMS_FIELD:
        return None
    tracked = checkpoints.averages(step)
    if name in tracked:
        return None
    known = ", ".join([*PARAMS_FIELD, *tracked])
    where = f"{what}={name} is not in {checkpoints.directory / str(step)}"
    wanted = averages.width(name)
    widths = [w for w in map(averages.width, tracked) if w is not None]
    if wanted is None or not widths:
        section = "averages.rates" if wanted is None else "averages.power"
        raise UserError(
            f"{where}; expected one of {known}: choose one of them, or train with {section}."
        )
    stored = snapshots.steps_before(checkpoints, step)
    if not stored:
        raise UserError(
            f"{where} and cannot be reconstructed, because there is no snapshot of an earlier step "
            f"in {snapshots.folder(checkpoints)}; expected some, or one of {known}: choose one of "
            "them, or train with a smaller averages.snapshot_every."
        )
    fit = snapshots.fit(averages.Profile(step, wanted), stored, widths)
    if fit.error > MAX_ERROR:
        raise UserError(
            f"{where} and cannot be reconstructed from its {len(widths)} power functions and "
            f"{len(stored)} earlier snapshots: the profile is missed by {fit.error:.1%}; expected "
            f"{MAX_ERROR:.0%} or less, or one of {known}: choose one of them, a width nearer to "
            "these, or train with a smaller averages.snapshot_every."
        )
    return fit


def restore(checkpoints: Checkpoints, step: int, name: str, shapes: Any) -> Any:
    """Reads the parameters of that name, straight onto their devices.

    Args:
      checkpoints, step, name: as in `check`.
      shapes: tree of jax.ShapeDtypeStruct with shardings.

    Raises:
      UserError: see `check`; or the files cannot be read as parameters of these shapes.
    """
    fit = check(checkpoints, step, name)
    if fit is not None:
        return snapshots.reconstruct(checkpoints, fit, shapes)
    if name in PARAMS_FIELD:
        field = PARAMS_FIELD[name]
        return checkpoints.restore(step, {field: shapes})[field]
    return checkpoints.restore(step, {"averages": {name: shapes}})["averages"][name]
