"""Makes pytorch.npz: what the code in docs/pytorch.md gives, by PyTorch, in float32.

  python -m tests.golden.export_cases FOLDER                  # an environment with jax
  TORCH_ENVIRONMENT/bin/python tests/golden/make_pytorch.py FOLDER     # torch, safetensors, numpy

Made with torch 2.13.0 on a CPU. The inputs are those of export_cases.py, which imports jax, so they
come with the folder: FOLDER/inputs.npz.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "pytorch.md"


def code() -> dict:
    """The names that the code blocks of the page define; what it does with them is left out."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block.partition("\nmodel = ")[0], names)
    return names


def outputs(folder: Path, inputs: dict, steps) -> dict[str, np.ndarray]:
    """Of the network, and of the sampler by number of steps."""
    names = code()
    model = names["ShortcutDiT"](folder)
    x, t, d, labels = (torch.from_numpy(inputs[key]) for key in ("x", "t", "d", "labels"))
    with torch.no_grad():
        found = {"output": model(x, t, d, labels).numpy()}
    for n in steps:
        found[f"samples_{n}"] = names["sample"](model, x, labels, n).numpy()
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1])
    golden = {}
    with np.load(root / "inputs.npz") as saved:
        for case in ("paper", "authors_code"):
            given = {key: saved[f"{case}/{key}"] for key in ("x", "t", "d", "labels")}
            for name, a in outputs(root / case, given, saved["steps"].tolist()).items():
                golden[f"{case}/{name}"] = a
    np.savez_compressed(HERE / "pytorch.npz", **golden)
