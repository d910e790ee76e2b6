"""The training step compiled for a machine that is not here: does it fit, and what does it cost?

libtpu compiles for every TPU without one. What is compiled is the step of `train.train` for the
same config, with the types and compiler options of that machine.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shortcut_jax import config as config_lib
from shortcut_jax import device_memory, run, spaces, train, validation
from shortcut_jax.errors import UserError
from shortcut_jax.models import dit
from shortcut_jax.objectives import Batch
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import collectives
from shortcut_jax.program import Program

# GiB of memory that the compiler has for a program on one device: what libtpu 0.0.42.1 says when it
# refuses one that is larger. A device is a core of v2 and v3 and a chip of the others.
HBM = {"v2": 7.48, "v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
EXAMPLES = "v3:2x2, v4:2x2x4, v5e:4x4, v5e:16x16, v5p:2x4x4, v6e:2x4, 2*v5e:4x4 (two slices)"

_NAME = re.compile(rf"(?:(?P<slices>[1-9]\d*)\*)?(?P<kind>{'|'.join(HBM)}):\d+(x\d+){{1,2}}")
_CPU = re.compile(r"cpu:(?P<devices>[1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that need not exist.

    Attributes:
      name: as it was asked for.
      devices: of all processes.
      hbm: bytes that a program may use on each, or None where nothing is known.
    """

    name: str
    devices: list[jax.Device]
    hbm: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a step, per device.

    Attributes:
      network: SIZE/PATCH, or width x depth/patch.
      objective: name of the method.
      topology: name of the machine.
      device: kind of its devices.
      devices: how many.
      mesh: sizes of the axes.
      batch_size: over all devices.
      settings: keys of the config that decide what is compiled.
      fits: whether the program fits into the memory.
      peak: bytes in use at most; None where it does not fit and the compiler does not say.
      hbm: bytes there are; None where nothing is known.
      state: bytes of the train state.
      copy: bytes of the copy of it that a save makes (`checkpoint.copy`), while steps go on.
      flops: of a step as the compiler gets it, everything counted; see `flops_of`.
      bytes_accessed: as the compiler counts them; see `bytes_of`. None where it cannot.
      collectives: kind -> (operations that a step runs, bytes of their results).
      largest_batch: a batch that fits by this one compilation; None where nothing is known.
      seconds: of all threads' CPU time that compiling took.
    """

    network: str
    objective: str
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    settings: dict[str, Any]
    fits: bool
    peak: float | None
    hbm: float | None
    state: int
    copy: int
    flops: float
    bytes_accessed: float | None
    collectives: dict[str, tuple[int, int]]
    largest_batch: int | None
    seconds: float

    def text(self) -> str:
        """As --dry_run prints it."""
        verdict = "fits" if self.fits else "does not fit"
        if self.fits and not device_memory.holds(self.hbm, self.peak, self.copy):
            verdict = (
                "does not fit beside the copy that a save makes: add --config.checkpoint.copy=host"
            )
        if self.hbm is None:
            verdict += f": {self.device} has no limit that is known"
        lines = {
            "step": f"{self.objective} of {self.network}",
            "topology": f"{self.topology}, {self.devices} devices of kind {self.device}",
            "mesh": f"{self.mesh}",
            "batch": f"{self.batch_size}, {self.batch_size // self.devices} per device",
            "peak memory": f"{_gib(self.peak)} per device, of {_gib(self.hbm)}",
            "train state": f"{_gib(self.state)} per device",
            "copy in a save": f"{_gib(self.copy)} per device",
        }
        lines["FLOPs"] = f"{self.flops:.4g} per device"
        if self.bytes_accessed is not None:
            lines["bytes accessed"] = f"{self.bytes_accessed:.4g} per device"
        for kind, (count, size) in self.collectives.items():
            lines[kind] = f"{count} per step, {size / 2**20:,.1f} MiB"
        lines["compiled in"] = f"{self.seconds:.1f} s of CPU time"
        if self.largest_batch is not None:
            lines["largest batch"] = (
                f"{self.largest_batch} at least, if all but the train state grows with the batch "
                "(estimated from this one compilation)"
            )
        lines["verdict"] = verdict
        return "\n".join(f"{name:<18} {value}" for name, value in lines.items())


def find_machine(name: str) -> Machine:
    """The devices of "cpu:8" or of a TPU such as "v5e:4x4"; no accelerator here is touched.

    Raises:
      UserError: there is no such machine, or libtpu is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    cpu, tpu = _CPU.fullmatch(name), _NAME.fullmatch(name)
    if cpu:
        return Machine(name, _cpu_devices(name, int(cpu["devices"])), None)
    if not tpu:
        raise UserError(
            f"--topology={name} is no machine; expected cpu:N, or GENERATION:AxB or AxBxC chips "
            f"with GENERATION one of {', '.join(HBM)}: use one such as {EXAMPLES}."
        )
    devices = _tpu_devices(name, tpu["kind"], int(tpu["slices"] or 1))
    return Machine(name, devices, HBM[tpu["kind"]] * device_memory.GIB)


def _cpu_devices(name: str, count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # they are made already
        logging.info("The CPU devices of this process exist; %s takes of these.", name)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology={name} asks for more than the {len(devices)} devices that XLA_FLAGS gives "
            "this process; expected at most these: leave the number out of XLA_FLAGS."
        )
    return devices[:count]


def _tpu_devices(name: str, kind: str, slices: int) -> list[jax.Device]:
    from jax.experimental import topologies

    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",  # else libtpu asks the cloud about this machine
        TPU_WORKER_HOSTNAMES="localhost",  # and complains of having no answer
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # beside a run on a TPU that is here: it stays untouched
    )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # as JAX runs them: one device for a chip
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name.rpartition("*")[2], **options
        )
    except Exception as error:  # JaxRuntimeError, RuntimeError and others: not documented
        if "not installed" in str(error):
            raise UserError(
                f"--topology={name} needs libtpu, the compiler for TPUs, which is not installed; "
                "expected the extra tpu, which needs no TPU: pip install -e '.[tpu]'."
            ) from error
        text = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"--topology={name} is no machine that libtpu knows ({text}); expected a shape of "
            f"whole hosts: use one such as {EXAMPLES}."
        ) from error
    return list(found.devices)


def compile_for(config: ConfigDict, machine: Machine) -> Report:
    """Compiles the step of a config for a machine.

    Args:
      config: of the run. Neither its data nor other files that it names are needed.
      machine: from `find_machine`.

    Raises:
      UserError: the config is wrong, or does not fit the number of devices.
    """
    run.check(config)
    slices = sharding.num_slices(machine.devices)
    axes = validation.check_devices(config, len(machine.devices), slices)
    mesh = sharding.make_mesh(*axes, machine.devices)
    run.check_device(config, machine.devices[0])
    setup = run.build(config, mesh)
    program = train.build_program(setup, *batch_shape(setup))
    start = time.process_time()
    compiled, peak = compile_program(program)
    seconds = time.process_time() - start
    found = collectives.collectives(compiled.as_text() or "") if compiled else []
    state_size = state_bytes(program)
    copy = state_size if config.checkpoint.copy == "device" else 0
    room = None if machine.hbm is None else machine.hbm - copy
    flat = config_lib.flatten(config)
    return Report(
        network=network_name(config.model),
        objective=config.objective.name,
        topology=machine.name,
        device=machine.devices[0].device_kind,
        devices=len(machine.devices),
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        settings={key: flat[key] for key in ("accumulation_steps", *config_lib.LAYOUT)}
        | {"model.attention": setup.network.attention},
        fits=compiled is not None,
        peak=peak,
        hbm=machine.hbm,
        state=state_size,
        copy=copy,
        flops=flops_of(config) / len(machine.devices),
        bytes_accessed=bytes_of(config, mesh, compiled) if compiled else None,
        collectives=collectives.by_kind(found),
        largest_batch=device_memory.largest_batch(config, math.prod(axes), room, state_size, peak),
        seconds=seconds,
    )


def program_for(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of a config on a mesh, without its data."""
    setup = run.build(config, mesh)
    return train.build_program(setup, *batch_shape(setup))


def flops_of(config: ConfigDict) -> float:
    """FLOPs of a step over all devices, with what `model.remat` computes again.

    Of the program before it is compiled, for one CPU device: what is compiled may have loops, whose
    body XLA counts once. Blocks are alike: the second one's FLOPs are those of all further ones.
    """
    mesh = sharding.make_mesh(1, 1, jax.devices("cpu")[:1])

    def count(few: ConfigDict) -> float:
        return (program_for(few, mesh).lower().cost_analysis() or {})["flops"]

    return _over_blocks(config, count)


def bytes_of(config: ConfigDict, mesh: Mesh, compiled: jax.stages.Compiled) -> float | None:
    """Bytes that a step accesses on a device, by the compiler's count of the step unrolled.

    Where layers are scanned that is estimated from few blocks, and rough on TPUs: of DiT-B on
    v5e:2x4 it is 48.0 GB, where the whole step unrolled has 39.8 (docs/step.md). With more blocks
    the compiler moves less between a chip's two memories.

    None where it is not to be had: with parts of a batch, and where parameters are split on a TPU,
    whose compiler makes loops of its own, rings of shards that are multiplied while they arrive.
    """
    rings = mesh.shape["fsdp"] > 1 and sharding.platform(mesh) == "tpu"
    if rings or config.accumulation_steps > 1:
        return None
    if not config.model.scan_layers:
        return _bytes(compiled)
    return _over_blocks(config, lambda few: _bytes(program_for(few, mesh).compile()))


def _bytes(compiled: jax.stages.Compiled) -> float:
    return (compiled.cost_analysis() or {})["bytes accessed"]


def _over_blocks(config: ConfigDict, count: Callable[[ConfigDict], float]) -> float:
    """A count of a step unrolled, from that of the step with one block and of that with two."""

    def of_few(depth: int) -> float:
        few = config.copy_and_resolve_references()
        few.model.update(scan_layers=False, depth=depth)
        few.accumulation_steps = 1
        return count(few)

    one = of_few(1)
    return one + (config.model.depth - 1) * (of_few(2) - one) if config.model.depth > 1 else one


def batch_shape(setup: run.Setup) -> tuple[Batch, spaces.DrawX1]:
    """Shapes of what the trainer gives the step, and how it gets x_1 from them."""
    shape, holds = setup.image_shape, "images"
    if setup.objective.teacher == "pairs":
        holds = "samples"
    elif isinstance(setup.space, spaces.Latents):
        shape = (*shape[:2], 2 * shape[2])
        holds = "moments"  # which images are encoded to before the step, too
    size = setup.config.batch_size

    def empty() -> Batch:
        image = jnp.zeros((size, *shape))
        noise = image if holds == "samples" else None
        return Batch(image, jnp.zeros(size, jnp.int32), noise)

    return jax.eval_shape(empty), spaces.way_from(setup.space, holds)[1]


def compile_program(program: Program) -> tuple[jax.stages.Compiled | None, float | None]:
    """The step, or None if it does not fit, and the bytes it needs on a device."""
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logging.info("The compiler says: %s", error)
        return None, device_memory.needed(str(error))
    return compiled, device_memory.peak(compiled, sharding.platform(program.mesh))


def network_name(model: ConfigDict) -> str:
    """SIZE/PATCH where the network is one of DiT's, or WIDTHxDEPTH/PATCH."""
    for name, size in dit.SIZES.items():
        if all(model[key] == value for key, value in size.items()):
            return f"DiT-{name}/{model.patch_size}"
    return f"DiT {model.hidden_size}x{model.depth}/{model.patch_size}"


def state_bytes(program: Program) -> int:
    """Bytes of the part of the train state that one device has."""
    parts = jax.tree.map(
        lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize,
        program.state_shape,
        program.state_sharding,
    )
    return sum(jax.tree.leaves(parts))


def _gib(size: float | None) -> str:
    return "an unknown amount" if size is None else f"{size / device_memory.GIB:.2f} GiB"
