"""Equal compute for every row of Table 1, counted in network evaluations.

One row passed forward is 1, backward 2 (the paper's accounting). The budget is what training the
shortcut model of the same config takes. A two-phase method pays for its teacher, and for the pairs
the teacher makes, out of the same budget; sampling for the evaluation is free for all.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a row spends its network evaluations.

    Attributes:
      updates: training steps of the row itself.
      per_update: network evaluations of one of them.
      teacher_updates: training steps of its teacher.
      teacher: network evaluations of all of those.
      pairs: network evaluations that make reflow's pairs.
    """

    updates: int
    per_update: float
    teacher_updates: int = 0
    teacher: float = 0.0
    pairs: float = 0.0

    @property
    def total(self) -> float:
        """All network evaluations."""
        return self.teacher + self.pairs + self.updates * self.per_update


def per_update(config: ConfigDict) -> float:
    """Network evaluations of one training step."""
    objective = config_lib.build_objective(config, num_classes=0)
    return 3.0 * config.batch_size + objective.target_evaluations(config.batch_size)


def split(total: float, row: ConfigDict, teacher: ConfigDict, teacher_share: float) -> Budget:
    """Spends `total` network evaluations, or up to one update more, on a row.

    Args:
      total: the budget.
      row: config of the row; its total_steps plays no part.
      teacher: config of a flow-matching teacher.
      teacher_share: what part of the budget a teacher gets, if the row has one.

    Raises:
      UserError: the teacher gets nothing, or teacher and pairs leave nothing for the student.
    """
    objective = config_lib.build_objective(row, num_classes=0)
    each, teacher_each = per_update(row), per_update(teacher)
    if objective.teacher == "none":
        return Budget(math.ceil(total / each), each)
    if not 0 < teacher_share < 1:
        raise UserError(
            f"--teacher_share={teacher_share} leaves nothing for the teacher or for its student; "
            "expected a part between 0 and 1, such as 0.5: change it."
        )
    teacher_updates = math.ceil(teacher_share * total / teacher_each)
    pairs = 0.0
    if objective.teacher == "pairs":
        passes = 1 if row.objective.cfg_scale in (0, 1) else 2
        pairs = float(row.objective.num_pairs * row.objective.pair_steps * passes)
    left = total - teacher_updates * teacher_each - pairs
    if left < each:
        raise UserError(
            f"objective={row.objective.name} has {total:,.0f} network evaluations, of which "
            f"{teacher_updates * teacher_each:,.0f} go to the teacher and {pairs:,.0f} to pairs, "
            "which leaves none for the student; expected some: lower objective.num_pairs in the "
            "config file or --teacher_share, or raise total_steps."
        )
    updates = math.ceil(left / each)
    return Budget(updates, each, teacher_updates, teacher_updates * teacher_each, pairs)
