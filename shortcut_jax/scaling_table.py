"""docs/scaling.md, from what shortcut_jax.scaling has kept.

python -m shortcut_jax.scaling_table docs/results/scaling.json > docs/scaling.md
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import cli, scaling
from shortcut_jax.errors import UserError

ROWS = flags.DEFINE_string("rows", None, "The file; may be given without --rows=.")

MIB = 2**20
COLUMNS = (
    "devices", "data x fsdp", "batch", "GFLOP", "of the least", "bytes accessed, MiB",
    "peak memory, MiB", "collectives, MiB of results", "received, MiB", "least, MiB",
    "of the least",
)  # fmt: skip


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: for each network weak and strong scaling, then what is sent by layer."""
    parts = [HEADER]
    for kind, network in dict.fromkeys((_kind(row), row["network"]) for row in rows):
        some = [row for row in rows if (_kind(row), row["network"]) == (kind, network)]
        some.sort(key=lambda row: (row["devices"], row["mesh"]["fsdp"] > 1, -row["mesh"]["fsdp"]))
        largest = max(row["devices"] for row in some)
        batch = max(row["batch_size"] for row in some)
        title = f"{network} on {kind}{', layers scanned' if some[0]['scanned'] else ''}"
        weak = [row for row in some if row["batch_size"] * largest == batch * row["devices"]]
        strong = [row for row in some if row["batch_size"] == batch]
        if len(weak) > sum(row["devices"] == largest for row in some):
            parts += [f"## {title}: weak scaling, {batch // largest} rows per device", table(weak)]
        parts += [f"## {title}: strong scaling, {batch} rows", table(strong)]
        fsdp = [r for r in strong if r["devices"] == largest and r["mesh"]["data"] == 1]
        for row in fsdp:
            where = f"{row['machine']}, fsdp of {row['mesh']['fsdp']}"
            parts += [f"### What {where} receives, MiB", by_layer(row)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in Markdown, per device and step."""
    lines = []
    for row in rows:
        kinds = [f"{kind} {size / MIB:.2f}" for kind, (_, size) in row["collectives"].items()]
        known = row["flops"] is not None
        lines.append(
            [
                str(row["devices"]),
                f"{row['mesh']['data']} x {row['mesh']['fsdp']}",
                str(row["batch_size"]),
                f"{(row['flops'] if known else row['flops_least']) / 1e9:,.2f}",
                _ratio(row["flops"], row["flops_least"]) if known else "-",
                f"{row['bytes_accessed'] / MIB:,.0f}" if known else "-",
                f"{row['peak'] / MIB:,.1f}",
                ", ".join(kinds) or "-",
                f"{row['received'] / MIB:,.2f}",
                f"{row['least'] / MIB:,.2f}",
                _ratio(row["received"], row["least"]),
            ]
        )
    return _markdown(COLUMNS, lines)


def by_layer(row: Mapping[str, Any]) -> str:
    """What is received for each layer in each pass, beside the least."""
    found: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, layer, _, size in row["received_by"]:
        found[layer][name] += size
    layers = [*row["least_by"], *(layer for layer in found if layer not in row["least_by"])]
    layers.sort(key=lambda layer: -max(row["least_by"].get(layer, 0), sum(found[layer].values())))
    passes = ("targets", "forward", "backward", "")
    lines = []
    for layer in layers:
        cells = [found[layer][name] for name in passes]
        whole, least = sum(cells), row["least_by"].get(layer, 0.0)
        if max(whole, least) < 0.001 * row["least"]:
            continue
        name = layer or "several, or not said"
        lines.append([name, *(f"{c / MIB:.2f}" for c in (*cells, whole, least))])
    head = ("layer", *(name or "other" for name in passes), "all", "least")
    return _markdown(head, lines)


def _kind(row: Mapping[str, Any]) -> str:
    name = row["machine"].partition(":")[0]
    return "CPU devices" if name == "cpu" else name


def _ratio(found: float, least: float) -> str:
    return f"{found / least:.2f}" if least else "-"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


HEADER = """\
# Scaling, by what the compiler counts
"""


def main() -> None:
    """Prints the page."""
    path = ROWS.value or "docs/results/scaling.json"
    rows = scaling.read(Path(path))
    if not rows:
        raise UserError(
            f"{path} holds no row; expected what shortcut_jax.scaling --out={path} keeps: compile "
            "some steps first."
        )
    print(page(rows), end="")


if __name__ == "__main__":
    cli.main(main, functools.partial(cli.parse_flags, positional="rows"))
