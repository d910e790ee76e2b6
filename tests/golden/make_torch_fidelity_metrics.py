"""Makes torch_fidelity_metrics.json: the metrics that torch-fidelity finds of seeded features.

Run by hand, in the environment of make_inception.py; the tests read the file and need no PyTorch:

    pip install absl-py
    PYTHONPATH=. python tests/golden/make_torch_fidelity_metrics.py

The features are a function of their names (`features`, `logits`), so that both sides make the same.
"""

import json
import platform
from pathlib import Path

import numpy as np

from shortcut_jax.metrics.inception_weights import random_array
from tests.golden.torchvision_shim import define_operators

FILE = Path(__file__).with_name("torch_fidelity_metrics.json")

# Name -> samples, reference images, features.
SETS = {"wide": (300, 250, 320), "narrow": (700, 600, 24), "few": (90, 150, 64)}
SUBSETS = {"wide": (10, 200), "narrow": (30, 300), "few": (7, 90)}  # of KID: how many, how large
NEIGHBOURS = (1, 3, 5)
# Name -> samples, classes, splits: of equal size, and not.
LOGITS = {"equal": (500, 100, 10), "unequal": (1003, 37, 10), "one": (64, 1008, 1)}


def features(name: str, which: str) -> np.ndarray:
    """Features of a set like Inception's, float32, 0 or more, of few large dimensions."""
    samples, reference, width = SETS[name]
    count, offset = (samples, 0.05) if which == "samples" else (reference, 0.15)
    decay = np.float32(3 * width**0.5) / np.arange(3, width + 3, dtype=np.float32)
    values = _uniform(f"{name}/{which}", (count, width))
    return np.maximum((values + np.float32(offset)) * decay, 0)


def logits(name: str) -> np.ndarray:
    """Logits between -6 and 6, float32."""
    count, classes, _ = LOGITS[name]
    return 6 * _uniform(f"logits/{name}", (count, classes))


def _uniform(name: str, shape: tuple[int, int]) -> np.ndarray:
    """float32 in [-1, 1); the array is one of a network's kernels, scaled for its width."""
    return random_array(name, shape) * np.float32((shape[1] / 6) ** 0.5)


def main() -> None:
    import torch

    define_operators(torch)
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc, version

    found: dict[str, dict[str, float]] = {}
    for name in SETS:
        sets = [torch.from_numpy(features(name, which)) for which in ("samples", "reference")]
        doubles = [x.double() for x in sets]
        statistics = [metric_fid.fid_features_to_statistics(x) for x in doubles]
        found[name] = dict(metric_fid.fid_statistics_to_metric(*statistics, verbose=False))
        subsets, size = SUBSETS[name]
        options = {"kid_subsets": subsets, "kid_subset_size": size, "verbose": False}
        found[name] |= metric_kid.kid_features_to_metric(*doubles, **options)
        single = metric_kid.kid_features_to_metric(*sets, **options)
        found[name] |= {f"float32/{key}": value for key, value in single.items()}
        for k in NEIGHBOURS:
            options = {"prc_neighborhood": k, "verbose": False}
            both = metric_prc.prc_features_to_metric(*sets, **options)
            found[name] |= {f"{k}/{key}": both[key] for key in ("precision", "recall")}
    for name, (_, _, splits) in LOGITS.items():
        x = torch.from_numpy(logits(name))
        found[f"logits/{name}"] = metric_isc.isc_features_to_metric(x, splits, shuffle=False)
    origin = {
        "torch-fidelity": version.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    FILE.write_text(json.dumps({"origin": origin, "found": found}, indent=1) + "\n")
    print(FILE.read_text())


if __name__ == "__main__":
    main()
