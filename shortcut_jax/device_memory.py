"""What of the memory of a device a compiled step needs, and what there is beside it."""

import re
from typing import Any

import jax
from ml_collections import ConfigDict

from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError

GIB = 2**30


def peak(compiled: jax.stages.Compiled, platform: str) -> float:
    """Bytes that a program needs on a device of a platform."""
    memory: Any = compiled.memory_analysis()
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    # What a CPU or GPU program allocates when it starts; a CPU's own peak leaves temporaries out.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + new


def holds(limit: float | None, peak: float | None, copy: float) -> bool:
    """Whether a device has room for a step and, beside it, for the copy that a save makes.

    What is not known (None) counts as room.
    """
    return limit is None or peak is None or peak + copy <= limit


def needed(refusal: str) -> float | None:
    """Bytes that a program needs by the compiler's refusal, of which there are two forms."""
    match = re.search(r"(?:Used |\()([\d.]+)([MGT])\)? (?:of|exceeds)", refusal)
    return float(match[1]) * {"M": 2**20, "G": GIB, "T": 2**40}[match[2]] if match else None


def largest_batch(
    config: ConfigDict, shards: int, hbm: float | None, state: int, peak: float | None
) -> int | None:
    """A batch that fits if all memory beyond the state is taken to grow with the batch.

    Some of it (gradients) does not, so that a larger one may fit, too. 0 if none does.
    """
    if hbm is None or peak is None or peak <= state:
        return None
    objective = config_lib.build_objective(config, num_classes=0)
    unit = shards * config.accumulation_steps
    most = int(config.batch_size * max(hbm - state, 0) / (peak - state))
    for size in range(most // unit * unit, 0, -unit):
        try:
            objective.validate(size, shards)
            return size
        except UserError:
            continue
    return 0
