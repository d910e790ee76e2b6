"""The training step of a DiT in PyTorch as one would write it there: torch.compile, bfloat16 by
autocast, scaled_dot_product_attention, fused AdamW, EMA by foreach. Needs PyTorch, safetensors.

Started by `shortcut_jax.benchmarks.torch_step` with {"model": {"patch_size", "hidden_size",
"depth", "num_heads", "num_classes", "mlp_ratio", "time_scale"}, "image_shape": [H, W, C],
"batch_size", "dtype", "ema_rate", "optimizer": arguments of AdamW, "weights": .safetensors,
"inputs" and "outputs": .npz, "steps" and "products" in a turn, "side" of these, "max_steps": M,
"threads", "compile"}. It first writes what the network says of the inputs (x, t, d, labels) in
float32, so that both sides can be seen to be the same network.
"""

import copy
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from turns import take_turns  # beside this file


def build(model: dict[str, Any], image_shape: list[int]) -> Any:
    """The network, its parameters laid out as docs/pytorch.md has them; `named` names them."""
    import torch
    from torch import nn
    from torch.nn import functional

    h, p, depth = model["hidden_size"], model["patch_size"], model["depth"]
    heads, grid, patch = model["num_heads"], image_shape[0] // p, p * p * image_shape[2]

    def norm(x: Any) -> Any:
        return functional.layer_norm(x, (h,), eps=1e-6)

    class Scalar(nn.Module):
        """[B] -> 256 sinusoids -> [B, h]."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(256, h)
            self.out = nn.Linear(h, h)

        def forward(self, a: Any) -> Any:
            frequencies = torch.exp(torch.arange(128, device=a.device) * (-math.log(10_000) / 128))
            angles = a[:, None] * frequencies
            x = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return self.out(functional.silu(self.first(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = int(h * model["mlp_ratio"])
            self.modulation, self.qkv = nn.Linear(h, 6 * h), nn.Linear(h, 3 * h)
            self.attention_out = nn.Linear(h, h)
            self.mlp_in, self.mlp_out = nn.Linear(h, hidden), nn.Linear(hidden, h)

        def forward(self, x: Any, c: Any) -> Any:
            m = self.modulation(c)[:, None].chunk(6, dim=-1)
            y = self.qkv(norm(x) * (1 + m[1]) + m[0])
            q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + m[2] * self.attention_out(y.transpose(1, 2).flatten(2))
            y = self.mlp_in(norm(x) * (1 + m[4]) + m[3])
            return x + m[5] * self.mlp_out(functional.gelu(y, approximate="tanh"))

    class DiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Linear(patch, h)
            self.t_embed, self.d_embed = Scalar(), Scalar()
            self.label_embed = nn.Embedding(model["num_classes"] + 1, h)
            for i in range(depth):
                self.add_module(f"block_{i}", Block())
            self.modulation, self.output = nn.Linear(h, 2 * h), nn.Linear(h, patch)
            self.register_buffer("position", position_embedding(h, grid), persistent=False)

        def forward(self, x: Any, t: Any, d: Any, labels: Any) -> Any:
            b = len(x)
            x = x.reshape(b, grid, p, grid, p, -1).transpose(2, 3).reshape(b, grid * grid, -1)
            x = self.patch_embed(x)
            x = (x + self.position).to(x.dtype)
            scale = model["time_scale"]
            c = self.t_embed(t * scale) + self.d_embed(d * scale) + self.label_embed(labels)
            c = functional.silu(c)
            for i in range(depth):
                x = self.get_submodule(f"block_{i}")(x, c)
            m = self.modulation(c)[:, None].chunk(2, dim=-1)
            x = self.output(norm(x) * (1 + m[1]) + m[0])
            x = x.reshape(b, grid, grid, p, p, -1).transpose(2, 3)
            return x.reshape(b, grid * p, grid * p, -1).float()

    return DiT()


def named(weights: dict[str, Any]) -> dict[str, Any]:
    """Exported weights by the names that they have here.

    torch.compile writes Python that reads every part of a module by its name, which `in` cannot be.
    """
    return {name.replace("_embed.in.", "_embed.first."): a for name, a in weights.items()}


def position_embedding(h: int, grid: int) -> Any:
    """[grid * grid, h] float32: sines and cosines of the column, then of the row."""
    import torch

    at = torch.arange(grid).double()
    f = 10_000.0 ** (-torch.arange(h // 4).double() / (h // 4))
    row, column = (a.reshape(-1, 1) * f for a in torch.meshgrid(at, at, indexing="ij"))
    parts = [column.sin(), column.cos(), row.sin(), row.cos()]
    return torch.cat(parts, dim=1).float()


class Training:
    """A network with its EMA and optimizer, and a batch that stays on the device."""

    def __init__(self, arguments: dict[str, Any], network: Any, device: str) -> None:
        import torch

        self.arguments, self.device = arguments, device
        self.network = network.to(device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        fused = {"fused": True} if device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), **arguments["optimizer"], **fused
        )
        rows, model = arguments["batch_size"], arguments["model"]
        self.images = torch.randn(rows, *arguments["image_shape"], device=device)
        self.labels = torch.arange(rows, device=device) % model["num_classes"]
        self._average = torch.optim.swa_utils.get_ema_multi_avg_fn(arguments["ema_rate"])
        # Not dynamic: else the number of bootstrap rows would become a variable of the program.
        compiled = torch.compile(self._loss_and_targets, dynamic=False)
        self._loss = compiled if arguments["compile"] else self._loss_and_targets

    def step(self, bootstrap: int) -> None:
        """One update; the first `bootstrap` rows learn from two half-steps of the EMA."""
        self._loss(bootstrap).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average(list(self.ema.parameters()), list(self.network.parameters()), None)

    def _loss_and_targets(self, bootstrap: int) -> Any:
        import torch

        images, device = self.images, self.device
        rows = len(images)
        dtype = getattr(torch, self.arguments["dtype"])
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            noise = torch.randn_like(images)
            t, d = torch.rand(rows, device=device), torch.zeros(rows, device=device)
            drop = torch.rand(rows, device=device) < 0.1
            labels = torch.where(drop, self.arguments["model"]["num_classes"], self.labels)
            target = images - noise
            if bootstrap:
                levels = round(math.log2(self.arguments["max_steps"]))
                level = torch.randint(0, levels, (bootstrap,), device=device)
                size = 2.0 ** -level.float()
                t_b = torch.floor(torch.rand(bootstrap, device=device) / size) * size
                t, d = torch.cat([t_b, t[bootstrap:]]), torch.cat([size, d[bootstrap:]])
                labels = torch.cat([self.labels[:bootstrap], labels[bootstrap:]])
            at = t[:, None, None, None]
            x_t = (1 - at) * noise + at * images
            if bootstrap:
                with torch.no_grad():
                    half, of = size / 2, labels[:bootstrap]
                    asked = torch.where(half < 1.5 / self.arguments["max_steps"], 0.0, half)
                    first = self.ema(x_t[:bootstrap], t_b, asked, of)
                    middle = x_t[:bootstrap] + half[:, None, None, None] * first
                    second = self.ema(middle, t_b + half, asked, of)
                target = torch.cat([(first + second) / 2, target[bootstrap:]])
            return ((self.network(x_t, t, d, labels) - target) ** 2).mean()


def matmul(side: int, repeats: int, dtype: Any, device: str) -> Callable[[], int]:
    """Products of square matrices: how fast this library's are here."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def work() -> int:
        for _ in range(repeats):
            a @ b
        wait(device)
        return repeats * 2 * side**3

    return work


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def forward_flops(network: Any, arguments: dict[str, Any]) -> int:
    """FLOPs of the network for one row, as PyTorch counts them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    one = torch.zeros(1)
    x = torch.zeros(1, *arguments["image_shape"])
    # Of products alone: PyTorch counts none of what the fused attention of a CPU does.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, one, one, one.long())
    return counter.get_total_flops()


def main(arguments: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(arguments["threads"])
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build(arguments["model"], arguments["image_shape"])
    network.load_state_dict(named(load_file(arguments["weights"])))
    with np.load(arguments["inputs"], allow_pickle=False) as file, torch.no_grad():
        given = [torch.from_numpy(file[name]) for name in ("x", "t", "d", "labels")]
        np.savez(arguments["outputs"], output=network(*given).numpy())
    facts = {"torch": torch.__version__, "torch_device": device}
    if device == "cuda":
        facts["torch_device"] = torch.cuda.get_device_name()
    facts["forward_flops"] = str(forward_flops(network, arguments))
    training = Training(arguments, network, device)

    def turn(bootstrap: int) -> Callable[[], int]:
        def work() -> int:
            for _ in range(arguments["steps"]):
                training.step(bootstrap)
            wait(device)
            return arguments["steps"]

        return work

    dtype = getattr(torch, arguments["dtype"])
    works = {
        "flow_matching": turn(0),
        "shortcut_1_4": turn(arguments["batch_size"] // 4),
        "ceiling": matmul(arguments["side"], arguments["products"], dtype, device),
    }
    take_turns(facts, works)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
