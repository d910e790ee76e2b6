"""The table of docs/topologies.md, from what main --topology --report has kept.

python -m shortcut_jax.planning.topology_table docs/results/topologies.json > docs/topologies.md
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import cli
from shortcut_jax.device_memory import GIB, holds
from shortcut_jax.errors import UserError
from shortcut_jax.files import read_json, write_atomically
from shortcut_jax.planning.topology import Report

REPORTS = flags.DEFINE_string("reports", None, "The file; may be given without --reports=.")

# What tells one row from another.
KEYS = ("network", "objective", "topology", "mesh", "batch_size", "settings")

HEADER = """\
# What the compiler says of whole machines

The training step of `configs/imagenet.py` (32x32x4 latents, 1,000 classes, guidance in the
targets), compiled for TPUs that were not there by the libtpu of jax 0.10.2; nothing was run, so
there are no times of steps. One row is

```bash
python -m shortcut_jax.main --config=configs/imagenet.py:b --workdir=runs/imagenet --dry_run \\
    --topology=v5e:4x4 --report=docs/results/topologies.json
```

with `:xl` for DiT-XL and `--config.mesh.fsdp=-1 --config.mesh.data=1` for fsdp, where the mesh is
given as data x fsdp; `bash launch/topologies.sh` makes all rows, or those of the machines it is
given, which takes long: what is missing here was not compiled. Memory is the peak on one device, or
what is needed where it does not fit, beside what the compiler has there. "copy=host" fits without
the copy of the train state that a save makes on the devices (--config.checkpoint.copy=host). "Sent"
is the bytes of the results of a step's collectives on a device. TFLOPs are those of a device, with
what is computed again, counted before the step is compiled. GB accessed are the compiler's count of
the step unrolled, estimated from those with one block and with two (it counts the body of a loop
once), which is too much: of DiT-B on v5e:2x4 48.0, where the whole step unrolled has 39.8
([step.md](step.md)). Under fsdp it makes loops of its own, and nothing is said; for DiT-XL it was
not counted. The last column is a batch that fits by the same compilation, all memory but the train
state and its copy taken to grow with it. Attention is "pallas" where "auto" takes it
([attention.md](attention.md)): on all machines after v3.

"""
COLUMNS = (
    "network", "topology", "devices", "mesh", "batch", "scanned", "remat", "attention",
    "peak / there is, GiB", "fits", "sent", "TFLOPs", "GB", "compiled in, CPU s",
    "a batch that fits",
)  # fmt: skip


def add(path: Path, report: Report) -> None:
    """Keeps a report in a JSON file, instead of one of the same step on the same machine."""
    row = json.loads(json.dumps(dataclasses.asdict(report)))
    others = [old for old in _read(path) if any(old[key] != row[key] for key in KEYS)]
    write_atomically(path, (json.dumps({"rows": [*others, row]}, indent=1) + "\n").encode())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, by network, then kind of mesh, then machine."""
    ordered = sorted(rows, key=lambda r: (r["network"], r["mesh"]["fsdp"] > 1, r["topology"]))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, ordered)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    sent = [f"{kind} {size / 2**20:,.0f} MiB" for kind, (_, size) in row["collectives"].items()]
    return [
        row["network"],
        row["topology"],
        str(row["devices"]),
        f"{row['mesh']['data']} x {row['mesh']['fsdp']}",
        f"{row['batch_size']:,}",
        "yes" if row["settings"]["model.scan_layers"] else "no",
        row["settings"]["model.remat"],
        row["settings"]["model.attention"],
        f"{_gib(row['peak'])} / {_gib(row['hbm'])}",
        _fits(row),
        ", ".join(sent) or "-",
        f"{row['flops'] / 1e12:.2f}",
        "-" if row["bytes_accessed"] is None else f"{row['bytes_accessed'] / 1e9:.1f}",
        "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
        "-" if row["largest_batch"] is None else f"{row['largest_batch']:,}",
    ]


def _fits(row: Mapping[str, Any]) -> str:
    if not row["fits"]:
        return "no"
    return "yes" if holds(row["hbm"], row["peak"], row["state"]) else "copy=host"


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return read_json(path, "what main --topology --report has kept").get("rows", [])


def main() -> None:
    """Prints the page."""
    path = REPORTS.value or "docs/results/topologies.json"
    rows = _read(Path(path))
    if not rows:
        raise UserError(
            f"{path} holds no report; expected what main --dry_run --topology=NAME --report={path} "
            "keeps: compile a step first."
        )
    print(HEADER + table(rows), end="")


if __name__ == "__main__":
    cli.main(main, functools.partial(cli.parse_flags, positional="reports"))
