"""Inception's features by torch-fidelity; needs PyTorch, torchvision and torch-fidelity only.

Started by `shortcut_jax.benchmarks.metrics` with {"weights": .npz file, "image_size", "batch_size",
"threads"}. It starts from uint8 images, so that resizing is in the time.
"""

import contextlib
import json
import sys
from typing import Any
from unittest import mock

from turns import take_turns  # beside this file


def main(arguments: dict[str, Any]) -> None:
    import numpy as np
    import torch

    with contextlib.suppress(RuntimeError):  # a torchvision that fits PyTorch defines them itself
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.set_num_threads(arguments["threads"])
    # Given a path, it loads the file with torch.load.
    with np.load(arguments["weights"], allow_pickle=False) as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    with mock.patch("torch.load", lambda *_, **__: weights):
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=arguments["weights"]
        ).eval()
    batch_size, size = arguments["batch_size"], arguments["image_size"]
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)

    def features() -> int:
        (found,) = network(images)
        return len(found)

    versions = {"torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__}
    with torch.inference_mode():
        take_turns(versions, {"features": features})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
