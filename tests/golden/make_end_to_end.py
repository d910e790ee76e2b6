"""Makes end_to_end.json: what torch-fidelity finds of two folders of PNG files.

Run by hand, in the environment of make_inception.py; the tests read the file and need no PyTorch:

    PYTHONPATH=. python tests/golden/make_end_to_end.py

The images are cut from scikit-learn's photographs; the weights are random, as there.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.golden import make_inception
from tests.golden.torchvision_shim import define_operators

FILE = Path(__file__).with_name("end_to_end.json")
SIDE = 48
COUNTS = {"samples": 24, "reference": 20}
SUBSETS, SUBSET_SIZE = 100, 20  # of KID: its usual number, as large as the smaller set
SPLITS = 10


def images(which: str) -> np.ndarray:
    """uint8 [n, SIDE, SIDE, 3]: samples of one photograph, the reference half of the other."""
    photographs = make_inception.photographs(427, 640)
    top, left = np.meshgrid(np.arange(5) * 90, np.arange(5) * 140, indexing="ij")
    places = np.column_stack([top.ravel() % 379, left.ravel()])[: COUNTS[which]]
    return np.stack(
        [
            photographs[i % 2 if which == "reference" else 0, t : t + SIDE, x : x + SIDE]
            for i, (t, x) in enumerate(places)
        ]
    )


def write(folder: Path) -> dict[str, Path]:
    """Folders of PNG files by name."""
    for which in COUNTS:
        (folder / which).mkdir()
        for i, image in enumerate(images(which)):
            Image.fromarray(image).save(folder / which / f"{i:03}.png")
    return {which: folder / which for which in COUNTS}


def exact_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of features [n, d] with n < d, float64, from n x n matrices.

    torch-fidelity takes roots of eigenvalues of the d x d product of covariances, which are
    rounding errors where there are fewer images than features: here 2e-5 of the distance.
    """
    x, y = (np.float64(f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (np.float64(a), np.float64(b)))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    difference = np.float64(a).mean(0) - np.float64(b).mean(0)
    return float(difference @ difference + (x**2).sum() + (y**2).sum() - 2 * root)


def main() -> None:
    import torch

    define_operators(torch)
    import torch_fidelity
    from torch_fidelity import feature_extractor_inceptionv3 as peer

    network = make_inception.random_network(peer, torch)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.pth"
        torch.save(network.state_dict(), weights)
        folders = write(Path(scratch))
        found = torch_fidelity.calculate_metrics(
            input1=str(folders["samples"]), input2=str(folders["reference"]), cuda=False,
            isc=True, fid=True, kid=True, prc=True, kid_subsets=SUBSETS,
            kid_subset_size=SUBSET_SIZE, samples_shuffle=False, isc_splits=SPLITS, verbose=False,
            save_cpu_ram=True, feature_extractor="inception-v3-compat", cache=False,
            feature_extractor_weights_path=str(weights), feature_layer_prc="2048",
        )  # fmt: skip
    with torch.no_grad():
        features = [network(make_inception.to_torch(images(which), torch))[0] for which in COUNTS]
    found["exact_frechet_inception_distance"] = exact_distance(*(f.numpy() for f in features))
    origin = {"torch-fidelity": torch_fidelity.__version__, "torch": torch.__version__}
    content = {"origin": origin, "photographs": make_inception.photograph_digest(), "found": found}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(FILE.read_text())


if __name__ == "__main__":
    main()
