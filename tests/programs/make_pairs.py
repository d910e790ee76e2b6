"""Makes the same pairs on several meshes: for tests/test_pairs.py.

python -m tests.programs.make_pairs OUT TEACHER DATA,FSDP ... writes OUT/DATA,FSDP.npz for each: the
noise, image and label of every pair that the teacher in the workdir TEACHER makes.
"""

import sys
from pathlib import Path

import numpy as np

from shortcut_jax import pairs, pretrained, run
from shortcut_jax.parallel import sharding
from tests.untrained_runs import small


def main(out: Path, teacher: str, specs: list[str]) -> None:
    config = small("reflow", teacher=teacher)
    found = pretrained.find(config).teacher
    for spec in specs:
        mesh = sharding.make_mesh(*map(int, spec.split(",")))  # may leave devices out
        setup = run.build(config, mesh)
        made = pairs.prepare(setup, found, out / spec)
        np.savez(out / f"{spec}.npz", **made.rows(np.arange(made.size)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
