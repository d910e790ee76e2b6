"""Weak and strong scaling of the training step, by what the compiler says of it; nothing is run.

  python -m shortcut_jax.planning.scaling --config=configs/digits.py --config.batch_size=256 \
      --machines=cpu:1,cpu:2,cpu:4,cpu:8 --kept=docs/results/scaling.json
  python -m shortcut_jax.planning.scaling_table docs/results/scaling.json > docs/scaling.md

Every machine is compiled for data-parallel, fully sharded, and with 8 devices or more in two data
groups; with config.batch_size over all devices (strong), and with that part of it per device which
the largest machine has (weak).
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from shortcut_jax import config_flag
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable, read_json, write_atomically

MACHINES = flags.DEFINE_list(
    "machines", ["cpu:1", "cpu:2", "cpu:4", "cpu:8"], "As --topology of main takes them."
)
KEPT = flags.DEFINE_string("kept", None, "JSON file that keeps the rows, beside those of others.")

# What tells one row from another.
KEYS = ("network", "machine", "mesh", "batch_size", "scanned")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile: machine, sizes of the mesh axes, rows over all devices."""

    machine: str
    devices: int
    data: int
    fsdp: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler says of a case, per device and step.

    Attributes:
      network: SIZE/PATCH, or width x depth/patch.
      machine: name of it.
      devices: how many.
      mesh: sizes of the axes.
      batch_size: over all devices.
      scanned: whether the layers are a loop.
      parameters: of the network, in bytes of the type that it computes in.
      flops: None where layers are scanned: the compiler counts the body of a loop once.
      flops_least: `flops.train_step`, of one device.
      bytes_accessed: the same as flops.
      peak: bytes of memory in use at most.
      collectives: kind -> (operations, bytes of their results).
      received: bytes that the device is sent by ring algorithms.
      least: the same by `communication.least`.
      received_by: (pass, layer, kind, bytes) of what is received, the largest first.
      least_by: layer -> bytes.
      seconds: of compilation.
    """

    network: str
    machine: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    scanned: bool
    parameters: int
    flops: float | None
    flops_least: float
    bytes_accessed: float | None
    peak: float | None
    collectives: dict[str, tuple[int, int]]
    received: float
    least: float
    received_by: list[tuple[str, str, str, float]]
    least_by: dict[str, float]
    seconds: float


def cases(sizes: dict[str, int], batch_size: int) -> list[Case]:
    """All that is to be compiled, none twice.

    Args:
      sizes: machine -> number of devices.
      batch_size: over all devices of the largest machine.

    Raises:
      UserError: the batch cannot be split over the largest.
    """
    largest = max(sizes.values())
    if batch_size % largest:
        raise UserError(
            f"batch_size={batch_size} cannot be split over the {largest} devices of the largest "
            f"machine; expected a multiple of {largest}: change --config.batch_size."
        )
    found: dict[Case, None] = {}  # in order
    for machine, n in sizes.items():
        meshes = [(n, 1), (1, n)] + ([(2, n // 2)] if n >= 8 else [])
        for data, fsdp in meshes:
            for size in (batch_size, batch_size // largest * n):
                found[Case(machine, n, data, fsdp, size)] = None
    return list(found)


def check(config: ConfigDict) -> None:
    """Raises UserError if `communication.least` is not worked out for the objective."""
    if config.objective.name != "shortcut":
        raise UserError(
            f"objective={config.objective.name} is not what the least of docs/scaling.md is worked "
            "out for; expected objective=shortcut: leave it out."
        )


def measure(config: ConfigDict, devices: Sequence[Any], case: Case) -> Row:
    """Compiles a case for devices of its machine."""
    import jax

    from shortcut_jax import device_memory, run, train, validation
    from shortcut_jax.parallel import sharding
    from shortcut_jax.planning import collectives, flops, topology

    config = config.copy_and_resolve_references()
    config.batch_size = config.eval.batch_size = case.batch_size
    config.mesh.update(data=case.data, fsdp=case.fsdp)
    axes = validation.check_devices(config, len(devices), sharding.num_slices(devices))
    setup = run.build(config, sharding.make_mesh(*axes, devices))
    program = train.build_program(setup, *topology.batch_shape(setup))
    start = time.monotonic()
    compiled = program.compile()
    seconds = time.monotonic() - start
    looped = config.model.scan_layers or config.accumulation_steps > 1
    cost = {} if looped else compiled.cost_analysis() or {}
    itemsize = jax.numpy.dtype(setup.network.dtype).itemsize
    found = collectives.collectives(compiled.as_text() or "")
    return Row(
        network=topology.network_name(config.model),
        machine=case.machine,
        devices=case.devices,
        mesh=dict(setup.mesh.shape),
        batch_size=case.batch_size,
        scanned=config.model.scan_layers,
        flops=cost.get("flops"),
        flops_least=flops.train_step(config, setup.image_shape) / case.devices,
        bytes_accessed=cost.get("bytes accessed"),
        peak=device_memory.peak(compiled, sharding.platform(setup.mesh)),
        seconds=seconds,
        **sent(found, program, itemsize),
    )


def sent(found: Sequence[Any], program: Any, itemsize: int) -> dict[str, Any]:
    """The fields of a row that say what is sent, and the least that could be.

    Args:
      found: `collectives.collectives` of the compiled program.
      program: it before it was compiled.
      itemsize: bytes of a number of the type that the network computes in.
    """
    from shortcut_jax import state
    from shortcut_jax.planning import collectives, communication

    received: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for each in found:
        received[*communication.origin(each.source), each.kind] += each.received
    params = program.state_shape.params
    least_by: defaultdict[str, float] = defaultdict(float)
    for path, size in communication.least(
        params, program.state_sharding.params, communication.SHORTCUT_PASSES, itemsize
    ).items():
        least_by[communication.layer(path)] += size
    largest_first = sorted(received.items(), key=lambda item: -item[1])
    return {
        "parameters": state.count(params) * itemsize,
        "collectives": collectives.by_kind(list(found)),
        "received": sum(received.values()),
        "least": sum(least_by.values()),
        "received_by": [(*where, size) for where, size in largest_first],
        "least_by": dict(least_by),
    }


def add(path: Path, row: Row) -> None:
    """Keeps a row in a JSON file, instead of one of the same case."""
    new = json.loads(json.dumps(dataclasses.asdict(row)))
    others = [old for old in read(path) if any(old[key] != new[key] for key in KEYS)]
    write_atomically(path, (json.dumps({"rows": [*others, new]}, indent=1) + "\n").encode())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; none if there is no file."""
    return read_json(path, "what planning.scaling has kept")["rows"] if path.exists() else []


def main() -> None:
    """Compiles all cases and keeps what the compiler says."""
    from shortcut_jax import run
    from shortcut_jax.planning import topology

    config = config_flag.CONFIG.value
    run.check(config)
    check(config)
    if KEPT.value:
        check_writable("--kept", Path(KEPT.value).absolute().parent)
    # CPU devices are made once for a process, so the most come first.
    names = sorted(MACHINES.value, key=_cpus, reverse=True)
    machines = {name: topology.find_machine(name).devices for name in names}
    sizes = {name: len(machines[name]) for name in MACHINES.value}
    for case in cases(sizes, config.batch_size):
        row = measure(config, machines[case.machine], case)
        if KEPT.value:
            add(Path(KEPT.value), row)
        print(
            f"{case.machine} {case.data}x{case.fsdp}, batch {case.batch_size}: "
            f"receives {row.received / 2**20:.2f} MiB, least {row.least / 2**20:.2f} MiB; "
            f"compiled in {row.seconds:.0f} s",
            flush=True,
        )


def _cpus(name: str) -> int:
    kind, _, count = name.partition(":")
    return int(count) if kind == "cpu" and count.isdigit() else 0


if __name__ == "__main__":
    config_flag.main(main)
