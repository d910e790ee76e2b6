"""A run: its parts before training or evaluation, and what its workdir and checkpoints say."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shortcut_jax import (
    checkpoint,
    data,
    device_memory,
    latent_cache,
    metrics,
    parameters,
    spaces,
    state,
    validation,
    versions,
)
from shortcut_jax import config as config_lib
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.files import (
    check_writable,
    read_json,
    remove_leftovers,
    write_atomically,
    writing_to,
)
from shortcut_jax.models import attention
from shortcut_jax.models.dit import DiT
from shortcut_jax.objectives import Objective
from shortcut_jax.parallel import distributed, sharding

FINISHED = "finished.json"  # written when the last checkpoint is durable
CONVERTED = "converted_from"  # in the data position of a checkpoint that no training wrote


@dataclasses.dataclass(frozen=True)
class Setup:
    """What training and evaluation both start from."""

    config: ConfigDict
    image_shape: tuple[int, int, int]  # of what the network sees: images, or latents of them
    num_classes: int
    objective: Objective
    network: DiT
    mesh: Mesh
    space: spaces.Space


def check(config: ConfigDict) -> tuple[tuple[int, int, int], int]:
    """Checks all of a config that can be known without starting a back end.

    Returns:
      (H, W, C) of what the network sees, and the number of classes.

    Raises:
      UserError: the first thing in the config that is wrong.
    """
    validation.check_values(config)
    image_shape, num_classes = data.describe(config.data)
    data.check_split(config.data)
    validation.validate(config, image_shape)
    return spaces.shape(config, image_shape), num_classes


def prepare(config: ConfigDict, measures: bool = True) -> Setup:
    """Validates the config as a whole and builds the parts that touch no data.

    Args:
      config: of the run.
      measures: samples will be measured, so the files that metrics need must be there.

    Raises:
      UserError: the first thing in the config that is wrong.
    """
    check(config)
    for name in config.eval.metrics if measures else ():
        metrics.check_files(name, config.eval)
    spaces.check_files(config)
    axes = validation.check_devices(config, jax.device_count(), sharding.num_slices())
    check_device(config, jax.devices()[0])
    return build(config, sharding.make_mesh(*axes))


def check_device(config: ConfigDict, device: jax.Device) -> None:
    """Raises UserError if the config asks for what that kind of device does not have."""
    image_shape, num_classes = check(config)
    objective = config_lib.build_objective(config, num_classes)
    use = state.attention_use(config, objective, image_shape, device)
    attention.check(config.model.attention, use)


def build(config: ConfigDict, mesh: Mesh) -> Setup:
    """The parts of a valid config on a mesh that may be another than the config's."""
    image_shape, num_classes = check(config)
    objective = config_lib.build_objective(config, num_classes)
    network = state.build_network(config, objective, image_shape, mesh.devices.flat[0])
    network = network.clone(rows=sharding.batch_sharding(mesh))
    space = spaces.build(config, mesh)
    return Setup(config, image_shape, num_classes, objective, network, mesh, space)


def open_data(setup: Setup) -> tuple[Dataset, Dataset | None]:
    """Opens what a run reads.

    Returns:
      What batches are made of, images or the latents that the config names; and the images that
      samples are compared with, None if the run measures nothing.

    Raises:
      UserError: they cannot be read, or are not what the config says.
    """
    config, space = setup.config, setup.space
    section = config.eval
    measures = bool(section.every and section.metrics and not section.get("reference", ""))
    latents = config.data.get("latents", "")
    images = data.open_dataset(config.data) if measures or not latents else None
    if isinstance(space, spaces.Latents) and latents:
        wanted = latent_cache.describe(config.data, config.autoencoder, space.sha256)
        cache = latent_cache.open_cache(Path(latents), wanted, setup.num_classes)
        return cache, images
    assert images is not None
    return space.identify(images), images if measures else None


def summary(setup: Setup) -> str:
    """What --dry_run prints: resolved config, parameters, mesh, batch per device."""
    config, mesh = setup.config, setup.mesh
    params = jax.eval_shape(
        lambda: state.init_params(setup.network, setup.image_shape, config.seed)
    )
    lines = [f"{key} = {value!r}" for key, value in sorted(config_lib.flatten(config).items())]
    lines += [
        "",
        f"the network sees     {setup.image_shape}, {setup.num_classes} classes",
        f"parameters           {state.count(params):,}",
        f"matrix products in   {setup.network.dtype}",
        f"mesh                 {dict(mesh.shape)} on {mesh.size} {jax.default_backend()} device(s)",
        f"batch                {config.batch_size}, {config.batch_size // mesh.size} per device",
        f"kinds of rows        {', '.join(setup.objective.branches)}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------- the workdir


def config_hash(config: ConfigDict) -> str:
    """12 hex digits that name a config."""
    text = json.dumps(config_lib.flatten(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def claim_workdir(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes config.json into a new workdir; refuses one that holds a run of another config.

    Of a run with checkpoints it is left as it is: what may change on resume is recorded by
    `record_config`, once the checkpoint is known to be one that the run can go on from.

    Raises:
      UserError: another config, naming the keys that differ, or a folder that cannot be written.
    """
    path = Path(workdir) / "config.json"
    if os.path.exists(path):  # unlike path.exists(), also where looking is not permitted
        _refuse_differences(read_config(workdir), config_lib.flatten(config), str(path))
    if jax.process_index() == 0:
        check_writable("--workdir", path.parent)
        with writing_to("--workdir", path.parent):
            for folder in (path.parent, path.parent / "eval"):
                remove_leftovers(folder)
        if not has_checkpoint(workdir):
            record_config(config, workdir)


def record_config(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes config.json, as process 0; a run that has more steps to do is no longer finished.

    Raises:
      UserError: the workdir cannot be written.
    """
    if jax.process_index() == 0:
        folder = Path(workdir)
        flat = json.dumps(config_lib.flatten(config), indent=1, sort_keys=True)
        with writing_to("--workdir", folder):
            if (finished_step(workdir) or 0) < config.total_steps:
                (folder / FINISHED).unlink(missing_ok=True)
            write_atomically(folder / "config.json", flat.encode())


def has_checkpoint(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run in the workdir would resume. (Unfinished checkpoints have longer names.)"""
    return any(p.name.isdigit() and p.is_dir() for p in (Path(workdir) / "checkpoints").glob("*"))


def check_workdir_for_evaluation(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Refuses to evaluate a workdir that is no run, or whose run differs in what evaluation uses.

    Raises:
      UserError: there is no config.json, or its data, model, objective or EMA differ.
    """
    path = Path(workdir) / "config.json"
    if not os.path.exists(path):
        raise UserError(
            f"--workdir={workdir} holds no run (no {path.name} to read); expected the workdir of a "
            "training run: train first with python -m shortcut_jax.main, or mend the path."
        )
    trained, flat = read_config(workdir), config_lib.flatten(config)
    used = ("model.", "objective.", "autoencoder.", "ema_rate", *config_lib.SHOWN)
    matters = {
        key
        for key in trained.keys() | flat.keys()
        if key.startswith(used) and key not in config_lib.MAY_CHANGE_ON_RESUME
    }
    _refuse_differences(
        {k: v for k, v in trained.items() if k in matters},
        {k: v for k, v in flat.items() if k in matters},
        str(path),
    )


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The flat config of the run in a workdir (UserError if it cannot be read)."""
    return read_json(Path(workdir) / "config.json", "the config of the run")


def restore_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config of the run in a workdir, locked and valid.

    Keys that config.json lacks, as it may if an older version wrote it, have their defaults, unless
    they say what was trained: those of objective, most of model, and data.name.

    Raises:
      UserError: it cannot be read, or is no config of this version.
    """
    return resolve(read_config(workdir), Path(workdir) / "config.json")


def resolve(flat: Mapping[str, Any], path: Path) -> ConfigDict:
    """The config that a flat one, written to `path`, stands for: see `restore_config`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config_lib.with_defaults(flat).items():
        section, _, name = key.rpartition(".")
        in_section = sections.setdefault(section, {})
        in_section[name] = tuple(value) if isinstance(value, list) else value
    try:
        config = ConfigDict({**sections.pop(""), **sections})
        validation.check_values(config)
        validation.validate(config, data.describe(config.data)[0])
    except (UserError, ValueError, AttributeError) as error:  # the last two: keys it refuses
        text = str(error).rstrip(".")
        raise UserError(
            f"{path} is not a config that this version of shortcut_jax can use ({text}); expected "
            "what its training wrote: restore that, or use the version that trained it."
        ) from error
    return config.lock()


def _refuse_differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    lines = config_lib.differences(old, new)
    if lines:
        raise UserError(
            f"{where} belongs to a run with another config (there -> asked for now): "
            f"{'; '.join(lines)}. Use that config or another --workdir; nothing was changed."
        )


def mark_finished(workdir: str | os.PathLike[str], step: int) -> None:
    """Says, after the last checkpoint is durable, that no more will come; to all processes."""
    if jax.process_index() == 0:
        write_atomically(Path(workdir) / FINISHED, json.dumps({"step": step}).encode())
    distributed.gather(step)


def finished_step(workdir: str | os.PathLike[str]) -> int | None:
    """The last step of a run that has ended, or None."""
    path = Path(workdir) / FINISHED
    return read_json(path, "the end of a run")["step"] if path.exists() else None


# ---------------------------------------------------------------------- checkpoints


def data_position(config: ConfigDict, dataset: Dataset, step: int) -> dict[str, Any]:
    """Where the input stands before step `step`: rows are addressed by index, so this is all."""
    row = step * config.batch_size
    return {
        "next_step": step,
        "next_row": row,
        "epoch": row // dataset.size,
        "dataset": dataset.fingerprint,
    }


def checkpoint_meta(
    config: ConfigDict, position: Mapping[str, Any], clock: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "config": config_lib.flatten(config),
        "data": dict(position),
        "clock": dict(clock),
        "versions": versions.recorded(),
    }


def restore_params(
    setup: Setup, checkpoints: checkpoint.Checkpoints, step: int, which: str
) -> tuple[Any, Any]:
    """The parameters of that name on the mesh of `setup`, and their shardings.

    Raises:
      UserError: the checkpoint has none of that name (`parameters.check`), or it cannot be read as
        parameters of this network.
    """
    shapes = jax.eval_shape(
        lambda: state.init_params(setup.network, setup.image_shape, setup.config.seed)
    )
    shardings = sharding.shard_tree(shapes, setup.mesh)
    wanted = checkpoint.with_shardings(shapes, shardings)
    return parameters.restore(checkpoints, step, which, wanted), shardings


def check_resume(config: ConfigDict, meta: Mapping[str, Any], dataset: Dataset, path: Path) -> None:
    """Refuses a checkpoint of another run, on other data, or of weights alone (UserError)."""
    if CONVERTED in meta["data"]:
        raise UserError(
            f"{path} holds converted weights and no state of a training; expected a run to "
            f"continue: start one from them, --config.init_from={path.parents[1]} and another "
            "--workdir."
        )
    _refuse_differences(meta["config"], config_lib.flatten(config), str(path))
    done = meta["data"]["next_step"]
    if done > config.total_steps:
        raise UserError(
            f"{path} is past total_steps={config.total_steps}; ask for at least {done} steps, or "
            "use another --workdir."
        )
    found = meta["data"]["dataset"]
    if found != dataset.fingerprint:
        raise UserError(
            f"{path} was trained on other data: {dataset.name} had fingerprint {found} and now has "
            f"{dataset.fingerprint}; expected the former: restore that data or use another "
            "--workdir."
        )
    if meta["data"]["next_step"] * config.batch_size != meta["data"]["next_row"]:
        raise UserError(f"{path} holds a data position that contradicts batch_size; use a copy.")


# ---------------------------------------------------------------------- the compiled step


def report_compiled(config: ConfigDict, compiled: Any, seconds: float) -> None:
    """Logs compile time, FLOPs and memory of the step, per device, as the compiler counts them.

    Raises:
      UserError: the devices have no room for the step, or for what a save copies beside it
        (`checkpoint.copy`).
    """
    needs = compiled.memory_analysis()
    mib = 2**20
    logging.info(
        "Compiled the step in %.1f s; per device: %.4g FLOPs, %.1f MiB arguments, %.1f MiB "
        "temporaries, %.1f MiB of the arguments updated in place.",
        seconds,
        (compiled.cost_analysis() or {}).get("flops", math.nan),  # not every compiler counts
        needs.argument_size_in_bytes / mib,
        needs.temp_size_in_bytes / mib,
        needs.alias_size_in_bytes / mib,
    )
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)  # a CPU says nothing
    peak, copy = device_memory.peak(compiled, device.platform), needs.alias_size_in_bytes
    # (A TPU's compiler knows what fits, and has refused what does not; a GPU's does not ask.)
    if device.platform == "gpu" and not device_memory.holds(limit, peak, 0):
        raise UserError(
            f"a step needs {peak / mib:,.0f} MiB, and a device has {limit / mib:,.0f} MiB for "
            "programs; expected room for it: raise --config.accumulation_steps, set "
            "--config.model.remat=full, or lower batch_size; of a GPU's memory jax takes three "
            "quarters unless the variable XLA_CLIENT_MEM_FRACTION says more."
        )
    if config.checkpoint.copy == "device" and not device_memory.holds(limit, peak, copy):
        raise UserError(
            f"a step needs {peak / mib:,.0f} MiB of the {limit / mib:,.0f} MiB of a device, and a "
            f"save with checkpoint.copy=device {copy / mib:,.0f} MiB beside it; expected room for "
            "both: set --config.checkpoint.copy=host, which holds up the steps until the host has "
            "the train state."
        )
