"""What `python -m shortcut_jax.benchmark` can measure. To add a part, add a line to PARTS.

A part is a module with `measure(options: Options) -> Iterator[Measurement]`. It makes its own
inputs, yields each number when it has it, and leaves nothing behind.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

PARTS = {
    "step": "shortcut_jax.benchmarks.step",
    "sample": "shortcut_jax.benchmarks.sample",
    "data": "shortcut_jax.benchmarks.data",
    "vae": "shortcut_jax.benchmarks.vae",
    "metrics": "shortcut_jax.benchmarks.metrics",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say.

    Attributes:
      repeats: rounds, of which the median counts.
      small: tiny inputs, to see that everything runs; the numbers then say little.
      tf_python, torch_python: Python of an environment to compare with; "" compares nothing.
    """

    repeats: int = 5
    small: bool = False
    tf_python: str = ""
    torch_python: str = ""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
      name: "part/what/how".
      value: median over rounds.
      unit: of value.
      spread: smallest and largest over rounds.
      conditions: what else there is to know, such as sizes; JSON.
    """

    name: str
    value: float
    unit: str
    spread: tuple[float, float]
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)


def summarize(
    name: str, values: Sequence[float], unit: str, conditions: dict[str, Any]
) -> Measurement:
    """The median of several rounds, with its spread."""
    return Measurement(
        name, statistics.median(values), unit, (min(values), max(values)), conditions
    )
