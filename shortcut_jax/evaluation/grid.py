"""Ways to sample from a checkpoint: numbers of steps, parameters, guidance."""

import dataclasses
from typing import NamedTuple

from shortcut_jax import averages, run, sampling


class Cell(NamedTuple):
    """One way to sample from a checkpoint."""

    params: str  # name of the parameters
    cfg_scale: float
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """What to sample from a checkpoint; where one is empty, as the config says."""

    steps: tuple[int, ...] = ()
    params: tuple[str, ...] = ()
    cfg_scales: tuple[float, ...] = ()


def cells(setup: run.Setup, grid: Grid) -> list[Cell]:
    """The ways to sample that a grid asks for; a scale that changes nothing makes none."""
    section, objective = setup.config.eval, setup.objective
    own = (objective.cfg_scale,)
    return [
        Cell(which, scale, num_steps)
        for which in grid.params or (section.params,)
        for num_steps in grid.steps or section.steps
        for scale in (grid.cfg_scales if objective.guided(num_steps) else own) or own
    ]


def check_grid(setup: run.Setup, grid: Grid) -> None:
    """Raises UserError for the first thing in a grid that this model cannot be sampled with."""
    objective = setup.objective
    for name in grid.params:
        averages.check_name(name, "--params")
    for num_steps in grid.steps:
        objective.check_steps(num_steps, "--steps")
    for scale in grid.cfg_scales:
        steps = grid.steps or setup.config.eval.steps
        guided = [n for n in steps if objective.guided(n)]
        sampling.check_cfg_scale(setup.config.objective, objective, scale, (guided or steps)[0])
