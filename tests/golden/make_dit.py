"""Makes dit_weights.pt.gz and dit_outputs.npz with the code of facebookresearch/DiT.

The code is models.py at commit ed81ce2, unchanged, with timm's layers:

  pip install torch==2.13.0 && pip install --no-deps timm==1.0.31 torchvision==0.28.0
  PYTHONPATH=CHECKOUT_OF_DIT python tests/golden/make_dit.py

dit_weights.pt.gz   a state dict, as the published weights are
dit_outputs.npz     the noise that the network predicts, and the inputs
"""

import gzip
import io
from pathlib import Path

import numpy as np
import philox
import torch

# This torchvision is built for CUDA; it needs two operators declared to be imported without.
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from models import DiT  # noqa: E402

HERE = Path(__file__).parent


def network(name):
    model = DiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
        num_classes=10,
    ).eval()  # fmt: skip
    for key, a in model.state_dict().items():
        if key != "pos_embed":
            values = philox.values(f"{name}/{key}", tuple(a.shape), 1.0, bits=8)
            fan_in = a[0].numel() if a.ndim > 1 else 64
            a.copy_(torch.from_numpy(values) * 2.0 ** -round(np.log2(fan_in) / 2))
    return model


if __name__ == "__main__":
    model = network("dit")
    x = philox.values("x", (10, 8, 8, 1), 2.0)
    levels = np.int64([0, 1, 10, 100, 250, 500, 750, 900, 998, 999])
    labels = np.int64([0, 1, 2, 3, 4, 5, 6, 9, 10, 10])
    with torch.no_grad():
        images = torch.from_numpy(x).permute(0, 3, 1, 2)
        output = model(images, torch.from_numpy(levels), torch.from_numpy(labels))
    noise = output[:, :1].permute(0, 2, 3, 1).numpy()
    np.savez_compressed(
        HERE / "dit_outputs.npz", x=x, levels=levels, labels=labels.astype(np.int32), noise=noise
    )
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    (HERE / "dit_weights.pt.gz").write_bytes(gzip.compress(content.getvalue(), mtime=0))
