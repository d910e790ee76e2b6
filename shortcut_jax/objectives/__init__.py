"""The objectives by name. A new method is one file here and one line below."""

import dataclasses
from typing import Any

from shortcut_jax.errors import UserError
from shortcut_jax.objectives.base import Batch, Objective, Progress, Targets, Velocities
from shortcut_jax.objectives.consistency_distillation import ConsistencyDistillation
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from shortcut_jax.objectives.diffusion import Diffusion
from shortcut_jax.objectives.flow_matching import FlowMatching
from shortcut_jax.objectives.live_reflow import LiveReflow
from shortcut_jax.objectives.mean_flow import MeanFlow
from shortcut_jax.objectives.progressive_distillation import ProgressiveDistillation
from shortcut_jax.objectives.reflow import Reflow
from shortcut_jax.objectives.shortcut import Shortcut

OBJECTIVES: dict[str, type[Objective]] = {
    # The rows of the paper's Table 1, in its order.
    "progressive_distillation": ProgressiveDistillation,
    "consistency_distillation": ConsistencyDistillation,
    "reflow": Reflow,
    "diffusion": Diffusion,
    "flow_matching": FlowMatching,
    "consistency_training": ConsistencyTraining,
    "live_reflow": LiveReflow,
    "shortcut": Shortcut,
    # Later than the paper.
    "mean_flow": MeanFlow,
}

__all__ = [
    "OBJECTIVES", "Batch", "Objective", "Progress", "Targets", "Velocities", "build", "options",
]  # fmt: skip


def options(name: str) -> dict[str, Any]:
    """The config keys of an objective and their defaults: its dataclass fields but `null_label`.

    Raises:
      UserError: no objective has that name.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective={name!r} is not one of {', '.join(OBJECTIVES)}.")
    fields = dataclasses.fields(OBJECTIVES[name])  # type: ignore[arg-type]
    return {f.name: f.default for f in fields if f.name != "null_label"}


def build(name: str, num_classes: int, **settings: Any) -> Objective:
    """The objective `name`; `settings` are the keys that `options(name)` lists."""
    return OBJECTIVES[name](null_label=num_classes, **settings)  # type: ignore[call-arg]
