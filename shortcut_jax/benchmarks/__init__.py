"""What `python -m shortcut_jax.benchmark` can measure. To add a part, add its name to PARTS.

A part is a module of this package with `measure(options: Options) -> Iterator[Measurement]`. It
makes its own inputs, yields each number when it has it, and leaves nothing behind.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

# In the order in which they are measured: the processes of `startup` need the accelerator, which
# this one takes for good with the first part after it.
PARTS = {
    name: f"shortcut_jax.benchmarks.{name}"
    for name in (
        "startup",
        "step",
        "sample",
        "checkpoint",
        "data",
        "vae",
        "metrics",
        "digits",
        "host",
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say.

    Attributes:
      repeats: rounds, of which the median counts.
      small: tiny inputs, to see that everything runs; the numbers then say little.
      tf_python, torch_python: Python of an environment to compare with; "" compares nothing.
      authors: folder of the authors' code, to compare with.
    """

    repeats: int = 5
    small: bool = False
    tf_python: str = ""
    torch_python: str = ""
    authors: str = ""


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


@dataclasses.dataclass(frozen=True)
class Failure:
    """What could not be measured, and why; what comes after it goes on.

    Attributes:
      name: as of the measurement.
      error: what was said.
      too_large: it does not fit into the memory, which is a result: nothing is to be mended.
    """

    name: str
    error: str
    too_large: bool = False


def summarize(
    name: str, values: Sequence[float], unit: str, conditions: dict[str, Any]
) -> Measurement:
    """The median of several rounds, with its spread."""
    return Measurement(
        name, statistics.median(values), unit, (min(values), max(values)), conditions
    )
