"""What `python -m shortcut_jax.convert` does: weights in and out of workdirs."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from shortcut_jax import checkpoint, config_flag, layers, run, state, trained
from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable, write_atomically
from shortcut_jax.parallel import sharding
from shortcut_jax.weights import authors, dit_torch, exported
from shortcut_jax.weights.tables import Sizes, flatten

# (channels, classes) of a network to the config file of the data set that has them.
CONFIG_FILES = {
    (4, 1): "configs/celebahq.py",  # latents
    (4, 1000): "configs/imagenet.py",
    (1, 10): "configs/digits.py",
}


def import_authors(path: Path, out: Path, config: ConfigDict | None = None) -> ConfigDict:
    """A checkpoint of the paper's authors becomes a workdir.

    Args:
      path: see `authors.read`.
      out: the workdir; gets config.json and checkpoints/STEP with both sets of parameters.
      config: of the run that it becomes, with authors_code. By default the one of the data set that
        has these channels and classes, with the sizes of this network.

    Returns:
      The config of the workdir.

    Raises:
      UserError: the file cannot be read, the config is of another network, or there is a run in
        `out`; nothing is written then.
    """
    switches = {k: v for k, v in config_lib.AUTHORS_CODE.items() if k.startswith("model.")}
    _check_before_reading(path, out, config, switches, "authors_code")
    found = authors.read(path)
    config = config or _config_for(found.sizes, path, "authors_code")
    _check_network(config, found.sizes, found.params, path)
    _write_run(config, out, path, found.step, found.params, found.ema)
    return config


def import_dit(path: Path, out: Path, config: ConfigDict | None = None) -> ConfigDict:
    """Weights of facebookresearch/DiT become the workdir of a diffusion run.

    Args, returns and raises: as `import_authors`; `path` see `dit_torch.read`. The config is one
    with objective=diffusion.
    """
    defaults = config_lib.flatten(config_lib.default())
    switches = {"objective.name": "diffusion"} | {
        key: defaults[key] for key in config_lib.AUTHORS_CODE if key.startswith("model.")
    }
    _check_before_reading(path, out, config, switches, "objective=diffusion")
    params, sizes = dit_torch.read(path)
    config = config or _config_for(sizes, path, "objective=diffusion")
    _check_network(config, sizes, params, path)
    _write_run(config, out, path, 0, params, params)
    return config


def import_exported(path: Path, out: Path) -> ConfigDict:
    """What `export` wrote becomes a workdir again, bit for bit.

    Raises:
      UserError: the folder cannot be read as that, or there is a run in `out`.
    """
    _check_free(out)
    params, description = exported.read(path)
    config = run.resolve(description["config"], path / exported.ARCHITECTURE)
    _check_shapes(_setup(config), params, path / exported.WEIGHTS)
    _write_run(config, out, path / exported.WEIGHTS, description["step"], params, params)
    return config


def export(workdir: Path, out: Path, step: int | None = None, params: str = "ema") -> list[Path]:
    """Writes the parameters of a checkpoint as safetensors, and JSON that says what they are.

    Args:
      workdir: of the run.
      out: folder for model.safetensors and architecture.json.
      step: of the checkpoint; the newest by default.
      params: see `trained.load`.

    Returns:
      The files.

    Raises:
      UserError: there is no such checkpoint, or one of the files exists already.
    """
    for name in (exported.WEIGHTS, exported.ARCHITECTURE):
        if os.path.exists(out / name):
            raise UserError(
                f"--out={out} holds {name} already; expected a folder without it: choose another "
                "one or move that file away."
            )
    model = trained.load(workdir, step, params)
    check_writable("--out", out)
    host = jax.tree.map(lambda a: np.asarray(sharding.to_host(a)), model.params)
    host = layers.unstack(host)
    contents = exported.files(host, exported.describe(model.setup, model.step, params))
    if jax.process_index() == 0:
        for name, content in contents.items():
            write_atomically(out / name, content)
    return [out / name for name in contents]


# ---------------------------------------------------------------------- the config


def _config_for(sizes: Sizes, path: Path, arg: str) -> ConfigDict:
    """The config of the data set that has these channels and classes, with these sizes."""
    file = CONFIG_FILES.get((sizes.channels, sizes.num_classes))
    if file is None or not os.path.isfile(file):
        raise UserError(
            f"{path} is a network of {sizes.channels} channels and {sizes.num_classes} classes, "
            f"for which there is no config file here ({file or 'none is known'}); expected one: "
            f"give --config=FILE.py:{arg}, or run from the root of the repository."
        )
    name = sizes.name()
    if name is None:
        raise UserError(
            f"{path} has width {sizes.hidden_size}, depth {sizes.depth} and patches of "
            f"{sizes.patch_size}, like no DiT of the paper, and the number of heads cannot be read "
            f"off weights; expected it from a config: give --config={file}:{arg}, "
            "--config.model.num_heads and these sizes."
        )
    argument = f"{file}:{arg},model={name}"
    logging.info("Using --config=%s, which evaluates it, too.", argument)
    return config_flag.load(argument)


def _check_before_reading(
    path: Path, out: Path, config: ConfigDict | None, switches: dict[str, Any], arg: str
) -> None:
    """What can be refused before a file of gigabytes is read."""
    _check_free(out)
    if config is None:
        return
    run.check(config)
    flat = config_lib.flatten(config)
    lines = [f"{k}={flat[k]} for {v}" for k, v in switches.items() if flat[k] != v]
    if lines:
        raise UserError(
            f"--config is of another network than {path} ({'; '.join(lines)}); expected what these "
            f"weights were trained with: add {arg} to the argument, --config=FILE.py:{arg}."
        )


def _check_network(config: ConfigDict, sizes: Sizes, params: Any, path: Path) -> None:
    lines = [
        f"model.{key}: {value} there, {config.model[key]} here"
        for key, value in sizes.model().items()
        if config.model[key] != value
    ]
    if lines:
        raise UserError(
            f"{path} is another network than --config says ({'; '.join(lines)}); expected the "
            "same sizes: change them with model=SIZE/PATCH in the argument, or with "
            "--config.model.KEY=VALUE."
        )
    _check_shapes(_setup(config), params, path)


def _setup(config: ConfigDict) -> run.Setup:
    """Without the files that evaluation needs: they need not be here to convert weights."""
    return run.build(config, sharding.make_mesh(jax.device_count(), 1))


def _check_shapes(setup: run.Setup, params: Any, path: Path) -> None:
    unrolled = setup.network.clone(scan_layers=False)  # as weights are outside of a training
    shapes = jax.eval_shape(
        lambda: state.init_params(unrolled, setup.image_shape, setup.config.seed)
    )
    wanted = {name: a.shape for name, a in flatten(shapes).items()}
    found = {name: a.shape for name, a in flatten(params).items()}
    lines = [
        f"{name}: {found.get(name)} there, {wanted.get(name)} here"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if lines:
        raise UserError(
            f"{path} does not fit the network of the config, for {setup.image_shape} and "
            f"{setup.num_classes} classes ({'; '.join(lines[:3])}); expected the same shapes: give "
            "the --config of the data set that these weights were trained on."
        )


# ---------------------------------------------------------------------- the workdir


def _check_free(out: Path) -> None:
    if run.has_checkpoint(out):
        raise UserError(
            f"--out={out} holds a run with checkpoints already; expected a new folder: choose "
            "another one, nothing was changed."
        )
    check_writable("--out", out)


def _write_run(
    config: ConfigDict, out: Path, source: Path, step: int, params: Any, ema: Any
) -> None:
    run.claim_workdir(config, out)
    with (source / f"{source.name}.tmp" if source.is_dir() else source).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    position = {run.CONVERTED: {"file": source.name, "sha256": digest}}
    checkpoints = checkpoint.Checkpoints(out, keep=1)
    checkpoints.save(
        step, {"params": params, "ema": ema}, run.checkpoint_meta(config, position, {})
    )
    checkpoints.close()
    logging.info("Wrote step %d, %d parameters.", step, state.count(params))
