"""Exported weights: model.safetensors in PyTorch's layout, and architecture.json.

Layers have the names of `DiT`, joined by dots, with `weight` [out, in] for `kernel` [in, out]:
block_0.qkv.weight, block_0.qkv.bias ... An embedding table is `label_embed.weight`. Moving and
transposing changes no bit, so that reading gives what was written.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from shortcut_jax import config as config_lib
from shortcut_jax import run, versions
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Objective
from shortcut_jax.weights.tables import flatten, unflatten

WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"
VERSION = 1
_NOT_ARCHITECTURE = (
    "parent", "name", "dtype", "residual_barrier", "remat", "scan_layers", "attention", "rows"
)  # fmt: skip

CONVENTIONS = {
    "t": "time in [0, 1]: 0 is noise, 1 is data",
    "d": "step size in [0, 1]: the network's answer v moves a sample from t to t + d as x + d v; "
    "0 asks for the velocity",
    "labels": "0 ... num_classes - 1, and num_classes for no label",
    "sampling": "n steps of x + v / n (rule euler); guidance w: v = v_null + w (v_label - v_null), "
    "0 = the null label alone, 1 = the label alone",
    "images": "[-1, 1], or scaled latents; layout [batch, height, width, channels]",
    "weights": "float32, dense layers [out, in]",
}


def describe(setup: run.Setup, step: int, params: str) -> dict[str, Any]:
    """The content of architecture.json: all that it takes to use the weights, and where from."""
    network, objective = setup.network, setup.objective
    fields = [field.name for field in dataclasses.fields(network)]
    return {
        "format": "shortcut_jax",
        "version": VERSION,
        "architecture": {
            **{name: getattr(network, name) for name in fields if name not in _NOT_ARCHITECTURE},
            "image_shape": list(setup.image_shape),
        },
        "objective": config_lib.flatten(setup.config.objective),
        "sampling": _sampling(objective),
        "conventions": CONVENTIONS,
        "step": step,
        "params": params,
        "config": _without_paths(config_lib.flatten(setup.config)),
        "versions": versions.recorded(),
    }


def _without_paths(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only the machine that trained it has, or is to know."""
    return {
        key: "" if key in config_lib.PATHS and value != "random" else value
        for key, value in flat.items()
    }


def _sampling(objective: Objective) -> dict[str, Any]:
    """The rule of a step, and for each number of steps the d to ask with and the guidance."""
    steps = {}
    for n in (2**i for i in range(8)):
        if objective.refusal(n):
            continue
        explicit = objective.cfg_scale == 0 or objective.guided(n)
        steps[str(n)] = {
            "d": float(objective.query_size(jnp.float32(1 / n))),
            "guidance": objective.cfg_scale if explicit else 1.0,
        }
    return {"rule": objective.sampler, "null_label": objective.null_label, "steps": steps}


def files(params: Any, description: Mapping[str, Any]) -> dict[str, bytes]:
    """Name to content of the files; `params` is a tree of numpy arrays."""
    from safetensors.numpy import save

    arrays = {_their_name(name): _turned(name, a) for name, a in flatten(params).items()}
    return {
        WEIGHTS: save(arrays, {"format": "pt"}),
        ARCHITECTURE: (json.dumps(description, indent=1, sort_keys=True) + "\n").encode(),
    }


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters, a tree of numpy arrays, and the description.

    Raises:
      UserError: a file is missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    description = run.read_json(folder / ARCHITECTURE, "what convert export wrote")
    if (description.get("format"), description.get("version")) != ("shortcut_jax", VERSION):
        raise UserError(
            f"{folder / ARCHITECTURE} is not of format shortcut_jax, version {VERSION}; expected "
            "what convert export wrote: export the weights again."
        )
    path = folder / WEIGHTS
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected what convert export wrote: restore it."
        ) from error
    params = {_our_name(name): _turned(name, a) for name, a in arrays.items()}
    return unflatten(params), description


def _their_name(name: str) -> str:
    *layer, last = name.split("/")
    return ".".join([*layer, {"kernel": "weight", "embedding": "weight"}.get(last, last)])


def _our_name(name: str) -> str:
    *layer, last = name.split(".")
    weight = "embedding" if layer == ["label_embed"] else "kernel"
    return "/".join([*layer, weight if last == "weight" else last])


def _turned(name: str, a: np.ndarray) -> np.ndarray:
    turned = a.ndim == 2 and not name.startswith("label_embed")
    return np.ascontiguousarray(a.T if turned else a)
