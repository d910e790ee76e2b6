"""Makes inception.npz: what torch-fidelity's Inception-v3 computes of two photographs.

Run by hand, in an environment of its own; the tests read the file and need no PyTorch:

    python3.11 -m venv /tmp/torch && . /tmp/torch/bin/activate
    pip install torch==2.13.0 numpy pillow scikit-learn ml_dtypes absl-py
    pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0
    PYTHONPATH=. python tests/golden/make_inception.py

The weights are random, running statistics too, and a function of their names alone
(`inception_weights.random_array`), so that both sides make the same ones. The photographs are
those of scikit-learn (`load_sample_images`), cut to 256x256 in the middle.
"""

import hashlib
import io
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.metrics import inception_weights
from tests.golden.torchvision_shim import define_operators

FILE = Path(__file__).with_name("inception.npz")
PROTOCOLS = ("tensorflow", "pytorch_fid")
# Of each layer and image: this many activations, then the largest and the root of the squares' sum.
KEPT = 24
# Rows and columns of photographs whose resized pixels are kept: larger, smaller, not square, equal.
SIZES = ((256, 256), (64, 64), (427, 640), (299, 299), (32, 300))
PIXELS = 200


def photographs(height: int = 256, width: int = 256) -> np.ndarray:
    """Two photographs, cut in the middle: uint8 [2, height, width, 3]."""
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def positions(size: int, count: int) -> np.ndarray:
    """`count` places spread over 0..size-1 without a period."""
    return (np.arange(1, count + 1) * 0.6180339887498949 % 1 * size).astype(np.int64)


def summary(activations: np.ndarray) -> np.ndarray:
    """[n, ...] in the order rows, columns, channels -> float32 [n, KEPT + 2]."""
    flat = np.asarray(activations, np.float64).reshape(len(activations), -1)
    kept = flat[:, positions(flat.shape[1], KEPT)]
    largest, norm = np.abs(flat).max(1), np.sqrt((flat**2).sum(1))
    return np.column_stack([kept, largest, norm]).astype(np.float32)


def main() -> None:
    import torch

    define_operators(torch)
    from torch_fidelity import feature_extractor_inceptionv3 as peer
    from torch_fidelity import version

    network = random_network(peer, torch)
    corner = peer.interpolate_bilinear_2d_like_tensorflow1x

    def half_pixel(x, size, align_corners):
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)

    found: dict[str, Any] = {}
    for protocol, resize in zip(PROTOCOLS, (corner, half_pixel), strict=True):
        for size in SIZES:
            pixels = to_torch(photographs(*size), torch).float()
            resized = to_numpy(resize(pixels, size=(299, 299), align_corners=False))
            flat = resized.reshape(2, -1)
            key = f"{protocol}/resized/{size[0]}x{size[1]}"
            found[key] = flat[:, positions(flat.shape[1], PIXELS)]
        # The network resizes by itself, then takes (v - 128) / 128.
        stretch = 1 if protocol == "tensorflow" else 128 / 127.5
        peer.interpolate_bilinear_2d_like_tensorflow1x = (
            lambda x, resize=resize, stretch=stretch, **kw: resize(x, **kw) * stretch
        )
        for name, values in run(network, peer, torch).items():
            found[f"{protocol}/{name}"] = values
    origin = {
        "torch-fidelity": version.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    content = io.BytesIO()
    np.savez_compressed(
        content, photographs=photograph_digest(), origin=json.dumps(origin), **found
    )
    FILE.write_bytes(content.getvalue())
    print(f"{FILE}: {len(found)} arrays, {FILE.stat().st_size / 1024:.0f} KiB, {origin}")


def random_network(peer, torch):
    """torch-fidelity's network with random weights."""
    load, peer.torch.load = peer.torch.load, lambda *_, **__: {}
    plain = peer.FeatureExtractorInceptionV3.load_state_dict
    peer.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    outputs = ["2048", "logits_unbiased", "logits"]
    network = peer.FeatureExtractorInceptionV3("x", outputs, feature_extractor_weights_path="-")
    peer.torch.load, peer.FeatureExtractorInceptionV3.load_state_dict = load, plain
    network.load_state_dict(
        {
            name: torch.from_numpy(inception_weights.random_array(name, tuple(a.shape)))
            for name, a in network.state_dict().items()
            if not name.endswith("num_batches_tracked")
        },
        strict=False,
    )
    return network


def run(network, peer, torch) -> dict[str, np.ndarray]:
    """Summaries of all layers and the outputs, of the photographs."""
    found, handles = {}, []
    blocks = [name for name, _ in network.named_children() if name.startswith("Mixed")]
    for name, module in network.named_modules():
        if isinstance(module, peer.BasicConv2d) or name in blocks:

            def keep(_, __, output, name=name):
                found[f"layer/{name}"] = summary(to_numpy(output))
                if name == "Mixed_6d":
                    found["spatial"] = to_numpy(output)[..., :7].reshape(len(output), -1)

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        outputs = network(to_torch(photographs(), torch))
    for handle in handles:
        handle.remove()
    found["features"], found["logits_unbiased"] = (a.numpy() for a in outputs[:2])
    found["layer/logits"] = summary(outputs[2].numpy())
    return found


def photograph_digest() -> str:
    """Of the pixels: another JPEG decoder may give others."""
    return hashlib.sha256(photographs().tobytes()).hexdigest()


def to_torch(images: np.ndarray, torch):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_numpy(tensor) -> np.ndarray:
    """[n, channels, rows, columns] -> [n, rows, columns, channels]."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main()
