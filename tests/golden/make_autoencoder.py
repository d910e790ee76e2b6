"""Writes autoencoder.npz: what diffusers' AutoencoderKL gives for weights that both sides can draw.

    pip install -e '.[parity]'        # in an environment of its own: brings PyTorch
    python tests/golden/make_autoencoder.py

The weights are `autoencoder_weights.random_weights(architecture, SEED)`, so none are stored;
loading them is strict, which checks our names and shapes against diffusers' own. The photograph is
`china.jpg` of scikit-learn. Versions and the machine are recorded under "origin".

Per case `sd/256x256`, `tiny/32x32`, `tiny/40x24`: images uint8 [B, H, W, 3] (tiny only; of sd the
sha256 of the crop), mean and logvar float32 [B, H/8, W/8, 4], and the decoded mean, of sd each
STRIDE-th row and column, with the Euclidean norm of the whole.
"""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

import numpy as np

from shortcut_jax.models.autoencoder import ARCHITECTURES
from shortcut_jax.weights.autoencoder_weights import Tensors, random_weights

OUT = Path(__file__).with_name("autoencoder.npz")
SEED = 7
STRIDE = 7
# case: corners (top, left) of the crops of the photograph
CASES = {
    "sd/256x256": [(100, 200)],
    "tiny/32x32": [(100, 200), (300, 40)],
    "tiny/40x24": [(170, 330)],
}
# With small first convolutions, so that the epsilon of the first normalisations shows.
FAINT = ("tiny/40x24",)


def case_images(case: str) -> np.ndarray:
    """The photographs of a case: uint8 [B, H, W, 3]."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image("china.jpg")  # [427, 640, 3]
    height, width = map(int, case.split("/")[1].split("x"))
    return np.stack([photograph[y : y + height, x : x + width] for y, x in CASES[case]])


def case_weights(case: str) -> Tensors:
    """The weights of a case, by diffusers' names."""
    tensors = random_weights(ARCHITECTURES[case.split("/")[0]], SEED)
    if case in FAINT:
        for name in tensors:
            if ".conv_in." in name:
                tensors[name] *= np.float32(1e-2)
    return tensors


def to_network(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def build(case: str):
    """diffusers' module with the weights of a case."""
    import torch
    from diffusers import AutoencoderKL

    architecture = ARCHITECTURES[case.split("/")[0]]
    levels = len(architecture.channels)
    module = AutoencoderKL(
        block_out_channels=architecture.channels,
        layers_per_block=architecture.layers,
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        act_fn="silu",
    )
    tensors = {name: torch.from_numpy(a) for name, a in case_weights(case).items()}
    module.load_state_dict(tensors, strict=True)
    return module.eval()


def main() -> None:
    import torch

    def nhwc(tensor):
        return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))

    arrays = {}
    for case in CASES:
        images = case_images(case)
        module = build(case)
        with torch.no_grad():
            x = torch.from_numpy(to_network(images).transpose(0, 3, 1, 2).copy())
            posterior = module.encode(x).latent_dist
            decoded = nhwc(module.decode(posterior.mean).sample)
        arrays[f"{case}/mean"] = nhwc(posterior.mean)
        arrays[f"{case}/logvar"] = nhwc(posterior.logvar)
        arrays[f"{case}/norm"] = np.linalg.norm(decoded.astype(np.float64))
        if case.startswith("sd/"):
            decoded = decoded[:, ::STRIDE, ::STRIDE]
            arrays[f"{case}/sha256"] = np.array(hashlib.sha256(images.tobytes()).hexdigest())
        else:
            arrays[f"{case}/images"] = images
        arrays[f"{case}/decoded"] = decoded
        for name in ("mean", "logvar", "decoded"):
            a = arrays[f"{case}/{name}"]
            print(f"{case} {name} {a.shape}: mean {a.mean():.3f}, deviation {a.std():.3f}")
    packages = ("torch", "diffusers", "numpy", "scikit-learn", "pillow")
    origin = {
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, float32",
        "seed": SEED,
    }
    np.savez_compressed(OUT, origin=np.array(json.dumps(origin)), **arrays)
    print(f"{OUT}: {OUT.stat().st_size} bytes. {origin}")


if __name__ == "__main__":
    main()
