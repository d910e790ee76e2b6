"""The paper's Table 1: FID-50k of DiT-B at 128, 4 and 1 sampling steps."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value of the table.

    Attributes:
      value: FID-50k.
      off_design: in parentheses there: a number of steps the method was not made for.
      unverified: not confirmed by any source but memory; never to be quoted as a fact.
    """

    value: float
    off_design: bool = False
    unverified: bool = False

    def __str__(self) -> str:
        text = f"({self.value})" if self.off_design else f"{self.value}"
        return text + "?" if self.unverified else text


def _off(value: float) -> Cell:
    return Cell(value, off_design=True)


def _unsure(value: float) -> Cell:
    return Cell(value, unverified=True)


STEPS = (128, 4, 1)
DATASETS = ("CelebA-HQ-256", "ImageNet-256")

# objective -> cells of (CelebA at 128, 4, 1), (ImageNet at 128, 4, 1)
TABLE_1 = {
    "progressive_distillation": (
        (_off(302.9), _off(251.3), Cell(14.8)),
        (_off(201.9), _off(142.5), Cell(35.6)),
    ),
    "consistency_distillation": (
        (Cell(59.5), Cell(39.6), Cell(38.2)),
        (_unsure(132.8), _unsure(98.01), _unsure(136.5)),
    ),
    "reflow": (
        (Cell(16.1), Cell(18.4), Cell(23.2)),
        (_unsure(16.9), _unsure(32.8), Cell(44.8)),
    ),
    "diffusion": (
        (Cell(23.0), _off(123.4), _off(132.2)),
        (Cell(39.7), _off(464.5), _off(467.2)),
    ),
    "flow_matching": (
        (Cell(7.3), _off(63.3), _off(280.5)),
        (Cell(17.3), _off(108.2), _off(324.8)),
    ),
    "consistency_training": (
        (Cell(53.7), Cell(19.0), Cell(33.2)),
        (Cell(42.8), Cell(43.0), Cell(69.7)),
    ),
    "live_reflow": (
        (Cell(6.3), Cell(27.2), Cell(43.3)),
        (_unsure(46.3), _unsure(95.8), Cell(58.1)),
    ),
    "shortcut": (
        (Cell(6.9), Cell(13.8), Cell(20.5)),
        (Cell(15.5), Cell(28.3), Cell(40.3)),
    ),
}
