"""Encode and decode of diffusers' AutoencoderKL; needs PyTorch and diffusers only.

Started by `shortcut_jax.benchmarks.vae` with {"channels", "layers", "groups", "image_size",
"batch_size", "threads"}. The weights are those it is initialised with.
"""

import json
import sys
from typing import Any

from turns import take_turns  # beside this file


def main(arguments: dict[str, Any]) -> None:
    # Not needed here, and one that does not fit PyTorch would stop diffusers.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import diffusers
    import torch

    torch.set_num_threads(arguments["threads"])
    channels = tuple(arguments["channels"])
    module = diffusers.AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=arguments["layers"],
        norm_num_groups=arguments["groups"],
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    ).eval()
    batch_size, size = arguments["batch_size"], arguments["image_size"]
    images = torch.rand(batch_size, 3, size, size) * 2 - 1

    def encode() -> int:
        module.encode(images).latent_dist.mean.sum().item()
        return batch_size

    def decode() -> int:
        module.decode(latents).sample.sum().item()
        return batch_size

    with torch.inference_mode():
        latents = torch.randn_like(module.encode(images).latent_dist.mean)
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        take_turns(versions, {"encode": encode, "decode": decode})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
