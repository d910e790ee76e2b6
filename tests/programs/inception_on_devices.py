"""Features of two photographs on all devices: for tests/metrics/test_inception.py.

python -m tests.programs.inception_on_devices OUT writes what `Extractor.outputs` gives to OUT.
"""

import sys

import jax
import numpy as np

from shortcut_jax.metrics import fid, inception
from shortcut_jax.metrics import inception_weights as weights_lib
from shortcut_jax.metrics.protocols import INCEPTION
from tests.golden import make_inception as golden


def main(out: str) -> None:
    weights = weights_lib.load(inception.weight_shapes(), weights_lib.RANDOM)
    extractor = fid.build_extractor(weights, INCEPTION["adm"], 1, jax.local_devices())
    np.savez(out, devices=len(jax.local_devices()), **extractor.outputs(golden.photographs()))


if __name__ == "__main__":
    main(sys.argv[1])
