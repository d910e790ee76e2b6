"""Makes torch_zip.pth, torch_legacy.pth and torch_files.npz: what PyTorch saves, and the numbers.

Run by hand where PyTorch is installed (torch==2.13.0 made the files here):

    PYTHONPATH=. python tests/golden/make_torch_files.py
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def main() -> None:
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (1, 5)), torch.nn.BatchNorm2d(3))
    state = module.state_dict()  # an OrderedDict with an attribute, as weight files are
    table = torch.arange(12.0).reshape(3, 4)
    state["transposed"] = table.T
    state["row"] = table[1]  # of the same storage
    state["double"] = torch.linspace(0, 1, 3, dtype=torch.float64)
    state["half"] = torch.tensor([1.5, -2.0], dtype=torch.float16)
    state["brain"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    state["flags"] = torch.tensor([True, False])
    state["empty"] = torch.zeros(0, 3)
    torch.save(state, FOLDER / "torch_zip.pth")
    torch.save(state, FOLDER / "torch_legacy.pth", _use_new_zipfile_serialization=False)
    numbers = {k: (v.float() if k == "brain" else v).numpy() for k, v in state.items()}
    np.savez_compressed(FOLDER / "torch_files.npz", **numbers)


if __name__ == "__main__":
    main()
