"""Our training step and the authors', as a compiler for TPUs sees both: docs/step.md.

python -m shortcut_jax.benchmarks.compiled --authors=CHECKOUT --topology=v5e:2x4 --size=b \
    --report=docs/results/compiled.json

ImageNet's latents, batch 256, one bootstrap row in eight, guidance in the targets, AdamW and EMA:
the same work for both. Counts have no noise; compile times are CPU seconds of all threads. Needs
libtpu (the extra tpu), no TPU. Theirs takes minutes to compile, some of ours, too.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from configs import imagenet
from shortcut_jax import cli, device_memory
from shortcut_jax.benchmarks import authors
from shortcut_jax.errors import UserError
from shortcut_jax.files import read_json, write_atomically
from shortcut_jax.planning import collectives, topology

AUTHORS = flags.DEFINE_string("authors", None, "Checkout of the authors' code.", required=True)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "Machine; see main --topology.")
SIZE = flags.DEFINE_enum("size", "b", ["b", "xl"], "Network: DiT-B/2 or DiT-XL/2.")
MESH = flags.DEFINE_enum("mesh", "dp", ["dp", "fsdp"], "How the train state is laid out.")
ROWS = flags.DEFINE_list("rows", [], "Only these rows, such as authors; all by default.")
REPORT = flags.DEFINE_string("report", "", "JSON file that keeps the rows, one for each name.")

BATCH_SIZE, LATENTS = 256, (32, 32, 4)
# Row -> what it changes in configs/imagenet.py, whose layers are scanned and rematerialised.
OURS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "4 parts of the batch": {"accumulation_steps": 4},
    "all of a block again": {"model.remat": "full"},
    "unrolled": {"model.scan_layers": False},
    "unrolled, attention by XLA": {"model.scan_layers": False, "model.attention": "xla"},
    "unrolled, nothing again": {"model.scan_layers": False, "model.remat": "none"},
}
COLUMNS = ("TFLOPs", "GB", "peak, GiB", "compiled in, CPU s", "collectives")


def main() -> None:
    """Compiles each row, prints it, and keeps it."""
    for name, row in _rows():
        print(line(name, row), flush=True)
        if REPORT.value:
            _keep(Path(REPORT.value), name, row)


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    known = ["authors", *OURS]
    for name in ROWS.value:
        if name not in known:
            raise UserError(
                f"--rows holds {name!r}; expected some of {', '.join(known)}, joined by commas: "
                "choose among them."
            )
    machine, size, mesh = topology.find_machine(TOPOLOGY.value), SIZE.value, MESH.value
    for name in ROWS.value or known:
        logging.info("Compiling: %s", name)
        if name == "authors":
            row = theirs(Path(AUTHORS.value), machine, size, mesh)
        else:
            row = ours(machine, size, mesh, OURS[name])
        yield f"{size} {TOPOLOGY.value} {mesh}: {name}", row


def ours(
    machine: topology.Machine, size: str, mesh: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts of our step with the released code's share and sizes of bootstrap rows."""
    config = imagenet.get_config(size)
    config.objective.update(bootstrap_fraction=0.125, step_size_sampling="stratified")
    config.update_from_flattened_dict(dict(changes))
    config.mesh.update(data=-1, fsdp=1) if mesh == "dp" else config.mesh.update(data=1, fsdp=-1)
    report = topology.compile_for(config, machine)
    names = ("flops", "bytes_accessed", "peak", "seconds", "collectives")
    row = {name: getattr(report, name) for name in names}
    # What a report says of loops is of few blocks, too rough beside a count of the whole step.
    return {**row, "bytes_accessed": None} if config.model.scan_layers else row


def theirs(checkout: Path, machine: topology.Machine, size: str, mesh: str) -> dict[str, Any]:
    """Counts of their step."""
    config = imagenet.get_config(size)
    sizes = ("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio")
    model = {name: config.model[name] for name in sizes}
    model |= {"bootstrap_cfg": 1, "cfg_scale": config.objective.cfg_scale, "sharding": mesh}
    step = authors.build(checkout, authors.Setting(model, BATCH_SIZE, LATENTS), machine.devices)
    start = time.process_time()
    compiled = step.compile()
    seconds = time.process_time() - start
    cost = compiled.cost_analysis() or {}
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "peak": device_memory.peak(compiled, machine.devices[0].platform),
        "seconds": seconds,
        "collectives": collectives.by_kind(collectives.collectives(compiled.as_text() or "")),
    }


def line(name: str, row: Mapping[str, Any]) -> str:
    """A row of the table in Markdown."""
    sent = [f"{kind} {size / 2**20:,.0f} MiB" for kind, (_, size) in row["collectives"].items()]
    counts = [
        "-" if row[key] is None else f"{row[key] / unit:.2f}"
        for key, unit in (("flops", 1e12), ("bytes_accessed", 1e9), ("peak", device_memory.GIB))
    ]
    return f"| {' | '.join([name, *counts, format(row['seconds'], '.0f'), ', '.join(sent)])} |"


def _keep(path: Path, name: str, row: Mapping[str, Any]) -> None:
    found = read_json(path, "what benchmarks.compiled has kept") if path.exists() else {}
    content = {**found, name: row, "jax": jax.__version__}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    cli.main(main)
