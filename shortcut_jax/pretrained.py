"""Parameters of another run: a teacher to learn from, or what a run starts from."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from shortcut_jax import checkpoint, data, layers, run, validation
from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import OBJECTIVES
from shortcut_jax.parallel import sharding
from shortcut_jax.state import TrainState

# Objectives whose network is an instantaneous velocity and nothing else.
TEACHERS = ("flow_matching", "reflow")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint of another run.

    Attributes:
      key: the config key that names it.
      workdir: of that run.
      step: of the checkpoint.
      config: of that run, flat.
    """

    key: str
    workdir: Path
    step: int
    config: Mapping[str, Any]

    def params(self, shapes: Any, shardings: Any) -> Any:
        """Its EMA parameters, on the devices.

        Raises:
          UserError: the checkpoint cannot be read as parameters of these shapes.
        """
        wanted = {"ema": checkpoint.with_shardings(shapes, shardings)}
        return _open(self.workdir).restore(self.step, wanted)["ema"]


@dataclasses.dataclass(frozen=True)
class Origins:
    """The runs that the config keys `teacher` and `init_from` name."""

    teacher: Pretrained | None
    init_from: Pretrained | None


def find(config: ConfigDict, resuming: bool = False, has_pairs: bool = False) -> Origins:
    """Looks up and checks the runs that the config names; reads no parameters.

    Args:
      config: of the run that shall learn or start from them.
      resuming: the run has a checkpoint, which has all that was copied from them, so that they are
        not looked up, but for a teacher that has to make pairs again:
      has_pairs: no pair that the run learns from is missing.

    Raises:
      UserError: one is not there, or is of another network, data set or kind than can be used.
    """
    run.check(config)
    validation.check_teacher(config)
    from_pairs = OBJECTIVES[config.objective.name].teacher == "pairs"
    teacher = init_from = None
    if resuming and from_pairs and not has_pairs:
        logging.info("Pairs of this run are missing, which its teacher has to make again.")
    if config.teacher and (not resuming or (from_pairs and not has_pairs)):
        teacher = _find("teacher", config.teacher)
    if config.init_from and not resuming:
        init_from = _find("init_from", config.init_from)
    for found in (teacher, init_from):
        if found:
            _check_network(found, config)
            _check_data(found, config)
    if teacher:
        _check_teacher(teacher, config)
    if resuming and (config.teacher or config.init_from):
        logging.info("Resuming: what was copied from teacher or init_from is in the checkpoint.")
    return Origins(teacher, init_from)


def start_from(origins: Origins, fresh: TrainState, shardings: TrainState) -> TrainState:
    """A fresh state with the parameters of other runs.

    The network and its averages start from `init_from`, else from the teacher; the step count, the
    optimizer and the metrics stay fresh. The teacher's parameters are its EMA.
    """
    start = origins.init_from or origins.teacher
    if start is None:
        return fresh
    params = start.params(fresh.params, shardings.params)
    logging.info("Starting from step %d of %s (%s).", start.step, start.workdir, start.key)
    ema = jax.tree.map(jnp.copy, params)
    averages = {name: jax.tree.map(jnp.copy, params) for name in fresh.averages}
    state = dataclasses.replace(fresh, params=params, ema=ema, averages=averages)
    if not fresh.teacher:
        return state
    assert origins.teacher is not None  # `validation` has refused a config without one
    return dataclasses.replace(
        state, teacher=origins.teacher.params(fresh.teacher, shardings.teacher)
    )


def digest(params: Any) -> str:
    """16 hex digits that name parameters, from every bit of them."""
    found = hashlib.sha256()
    host = jax.tree.map(sharding.to_host, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers.unstack(host)):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def _find(key: str, text: str) -> Pretrained:
    """The checkpoint that WORKDIR (its newest) or WORKDIR/checkpoints/STEP names."""
    path = Path(text).absolute()
    step = None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    if not os.path.isfile(path / "config.json"):  # unlike Path's, false where it cannot look
        raise UserError(
            f"{key}={text} names no run (there is no {path / 'config.json'}); expected the workdir "
            "of a training run or WORKDIR/checkpoints/STEP: mend the path, or train that run first."
        )
    steps = _open(path).steps()
    if not steps or step not in (None, *steps):
        found = f"has {', '.join(map(str, steps))}" if steps else "has none yet"
        raise UserError(
            f"{key}={text} names a checkpoint that there is not: {path} {found}; expected a "
            "finished one: choose one of them, or train that run first."
        )
    flat = run.read_config(path)
    return Pretrained(key, path, steps[-1] if step is None else step, flat)


def _open(workdir: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(workdir, keep=1, read_only=True)


def _differences(found: Pretrained, config: ConfigDict, keys: Iterable[str]) -> list[str]:
    flat = config_lib.flatten(config)
    return [
        f"{key}: {found.config.get(key)} there, {flat.get(key)} here"
        for key in sorted(keys)
        if found.config.get(key) != flat.get(key)
    ]


def _images(flat: Mapping[str, Any]) -> str:
    section = {k.removeprefix("data."): v for k, v in flat.items() if k.startswith("data.")}
    try:
        (height, width, channels), num_classes = data.describe(section)
    except (UserError, KeyError) as error:  # that of a fork, or damaged
        return f"unknown ({str(error).rstrip('.')})"
    return f"{height}x{width}x{channels} of {num_classes} classes"


def _check_network(found: Pretrained, config: ConfigDict) -> None:
    flat = config_lib.flatten(config)
    keys = {
        key
        for key in flat.keys() | found.config.keys()
        if (key.startswith("model.") and key not in ("model.dtype", *config_lib.LAYOUT))
        or key in ("autoencoder.kind", "autoencoder.scale")
    }
    lines = _differences(found, config, keys)
    there, here = _images(found.config), _images(flat)
    if there != here:
        lines.append(f"images: {there} there, {here} here")
    if lines:
        raise UserError(
            f"{found.key}={found.workdir} is another network ({'; '.join(lines)}); expected one of "
            "the same config.model for such images: use such a run, or change the config."
        )


def _check_data(found: Pretrained, config: ConfigDict) -> None:
    lines = "; ".join(_differences(found, config, config_lib.SHOWN))
    if lines and found.key == "teacher":
        raise UserError(
            f"teacher={found.workdir} was trained on other data ({lines}); expected the data of "
            "this run, which is what it teaches: use such a teacher, or change the config."
        )
    if lines:  # fine-tuning
        logging.info("%s=%s was trained on other data: %s.", found.key, found.workdir, lines)


def _check_teacher(teacher: Pretrained, config: ConfigDict) -> None:
    name, scale = teacher.config.get("objective.name"), teacher.config.get("objective.cfg_scale")
    if name not in TEACHERS:
        raise UserError(
            f"teacher={teacher.workdir} was trained with objective={name}; expected a velocity "
            f"model, objective={' or '.join(TEACHERS)}: train one and name its workdir."
        )
    wanted = config.objective.cfg_scale
    if (wanted == 0) != (scale == 0):
        kinds = {True: "unconditional", False: "conditional"}
        raise UserError(
            f"teacher={teacher.workdir} is {kinds[scale == 0]} (its objective.cfg_scale={scale}), "
            f"but objective.cfg_scale={wanted} here; expected both to be 0 or neither: change "
            "objective.cfg_scale or use another teacher."
        )
    if wanted not in (0, 1) and not teacher.config.get("objective.class_dropout"):
        raise UserError(
            f"objective.cfg_scale={wanted} guides the teacher {teacher.workdir}, which never saw "
            "the null label (its objective.class_dropout=0); expected a teacher trained with some "
            "dropout: use one, or set objective.cfg_scale=1."
        )
