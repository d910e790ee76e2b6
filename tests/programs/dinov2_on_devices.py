"""Features of images on all devices: for tests/metrics/test_dinov2.py.

python -m tests.programs.dinov2_on_devices IMAGES OUT writes what `Extractor.outputs` gives to OUT.
"""

import sys

import jax
import numpy as np

from tests.metrics.test_dinov2 import small_extractor


def main(images: str, out: str) -> None:
    extractor = small_extractor("edm2", 1, jax.local_devices())
    np.savez(out, devices=len(jax.local_devices()), **extractor.outputs(np.load(images)))


if __name__ == "__main__":
    main(*sys.argv[1:])
