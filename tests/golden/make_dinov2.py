"""Makes dinov2.npz: what Meta's DINOv2 computes of two photographs, small and as ViT-L/14.

Run by hand, in an environment of its own; the tests read the file and need no PyTorch:

    python3.11 -m venv /tmp/torch && . /tmp/torch/bin/activate
    pip install torch==2.13.0 numpy pillow scikit-learn ml_dtypes absl-py
    git clone https://github.com/facebookresearch/dinov2 /tmp/dinov2
    git -C /tmp/dinov2 checkout b8931f7bf91576930313be2c6d6af376033b35f0
    PYTHONPATH=.:/tmp/dinov2 python tests/golden/make_dinov2.py

The weights are random and a function of their names alone (`dinov2_weights`), so that both sides
make the same ones. Images are resized and scaled as calculate_metrics.py of
https://github.com/NVlabs/edm2 (4bf8162) does it by default, and as it does in its mode "pil", which
it has from https://github.com/layer6ai-labs/dgm-eval.
"""

import functools
import io
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from shortcut_jax.metrics import dinov2_weights
from tests.golden.make_inception import (
    PIXELS,
    SIZES,
    photograph_digest,
    photographs,
    positions,
    summary,
)

FILE = Path(__file__).with_name("dinov2.npz")
PROTOCOLS = ("edm2", "dgm_eval")
# Depth, width and heads.
NETWORKS = {"small": (2, 64, 2), "large": (24, 1024, 16)}
# Of every block; then the whole network's.
IN_BLOCKS = ("norm1", "attn.qkv", "attn", "norm2", "mlp.fc1", "mlp")
LAYER = re.compile(rf"patch_embed|norm|blocks\.\d+(\.({'|'.join(map(re.escape, IN_BLOCKS))}))?")

EMBEDDING = re.compile("patch_embed|cls_token|pos_embed")
FAINT = 1e-3


def main() -> None:
    import torch

    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        for size in SIZES:
            seen = see(photographs(*size), protocol, torch)
            flat = seen.permute(0, 2, 3, 1).reshape(2, -1).numpy()
            key = f"{protocol}/seen/{size[0]}x{size[1]}"
            found[key] = flat[:, positions(flat.shape[1], PIXELS)]
    for name, sizes in NETWORKS.items():
        network = random_network(sizes, torch)
        nothing = torch.zeros(1, 257, sizes[1])
        places = network.interpolate_pos_encoding(nothing, 224, 224).detach().numpy()
        found[f"{name}/places"] = places.reshape(-1)[positions(places.size, PIXELS)]
        seen = torch.cat([see(photographs(), protocol, torch) for protocol in PROTOCOLS])
        found |= {f"{name}/{key}": values for key, values in run(network, seen, torch).items()}
        if name == "small":
            found[f"{name}/faint_features"] = faint_features(network, seen, torch)
    origin = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": pillow_version,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    content = io.BytesIO()
    np.savez_compressed(
        content, photographs=photograph_digest(), origin=json.dumps(origin), **found
    )
    FILE.write_bytes(content.getvalue())
    print(f"{FILE}: {len(found)} arrays, {FILE.stat().st_size / 1024:.0f} KiB, {origin}")


def see(images: np.ndarray, protocol: str, torch):
    """What the network sees of uint8 images [n, H, W, 3]: [n, 3, 224, 224]."""
    if protocol == "dgm_eval":
        bicubic, size = Image.Resampling.BICUBIC, (224, 224)
        images = np.stack([np.asarray(Image.fromarray(i).resize(size, bicubic)) for i in images])
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    if protocol == "edm2":
        resize = torch.nn.functional.interpolate
        x = resize(x, size=(224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x / 255 - mean[:, None, None]) / std[:, None, None]


def random_network(sizes: tuple[int, int, int], torch):
    """Meta's network, built as its hub builds ViT-L/14, but of these sizes; random weights."""
    from dinov2.hub import backbones
    from dinov2.models import vision_transformer as peer

    depth, width, heads = sizes
    block = functools.partial(peer.Block, attn_class=peer.MemEffAttention)
    peer.sized = functools.partial(
        peer.DinoVisionTransformer,
        embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4, block_fn=block,
    )  # fmt: skip
    network = backbones._make_dinov2_model(arch_name="sized", pretrained=False).eval()
    make = dinov2_weights.NETWORK.random_array
    state = {name: make(name, tuple(a.shape)) for name, a in network.state_dict().items()}
    network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return network


def run(network, seen, torch) -> dict[str, np.ndarray]:
    """Summaries of all layers, and the features."""
    found = {}
    for name, module in network.named_modules():
        if LAYER.fullmatch(name):

            def keep(_, __, output, name=name):
                found[f"layer/{name}"] = summary(output.numpy())

            module.register_forward_hook(keep)
    with torch.no_grad():
        found["features"] = network(seen).numpy()
    return found


def faint_features(network, seen, torch) -> np.ndarray:
    """The features if all tokens enter the blocks as faint as the epsilon of the normalisation."""
    state = network.state_dict()
    faint = {k: FAINT * a if EMBEDDING.match(k) else a for k, a in state.items()}
    network.load_state_dict(faint)
    with torch.no_grad():
        return network(seen).numpy()


if __name__ == "__main__":
    main()
