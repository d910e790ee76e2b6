"""docs/scaling.md, from what shortcut_jax.planning.scaling has kept.

python -m shortcut_jax.planning.scaling_table docs/results/scaling.json > docs/scaling.md
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import cli
from shortcut_jax.errors import UserError
from shortcut_jax.planning import scaling

ROWS = flags.DEFINE_string("rows", None, "The file; may be given without --rows=.")

MIB = 2**20
COLUMNS = (
    "devices", "data x fsdp", "batch", "GFLOP", "of the least", "bytes accessed, MiB",
    "peak memory, MiB", "collectives, MiB of results", "received, MiB", "least, MiB",
    "of the least",
)  # fmt: skip


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: for each network weak and strong scaling, then what is sent by layer."""
    parts = [HEADER.format(**_milliseconds(rows)).rstrip()]
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
        fsdp = [row for row in strong if row["mesh"]["data"] == 1 < row["mesh"]["fsdp"]]
        for row in fsdp[-1:]:  # on the most devices
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


def _milliseconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of DiT-B/2 on v5e:2x4, fully sharded, 32 rows on each chip."""
    wanted = {"machine": "v5e:2x4", "mesh": {"data": 1, "fsdp": 8}, "batch_size": 256}
    (row,) = [r for r in rows if wanted.items() <= r.items()]
    links = 200e9  # bytes a second, into a chip
    return {
        "compute": 1e3 * row["flops_least"] / (0.4 * 197e12),
        "fsdp": 1e3 * row["received"] / links,
        "dp": 1e3 * 2 * row["parameters"] * 7 / 8 / links,
    }


def _kind(row: Mapping[str, Any]) -> str:
    name = row["machine"].partition(":")[0]
    return "CPU devices" if name == "cpu" else name


def _ratio(found: float, least: float) -> str:
    return f"{found / least:.2f}" if least else "-"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


HEADER = """\
# Scaling, by what the compiler counts

Nothing here was timed: no accelerator was to be had where this was developed. The real training
step of the shortcut model was compiled for 1 to 8 CPU devices, and for TPUs that were not there,
and its text read (`shortcut_jax/planning/collectives.py`). All figures are of one device and one
step. The memory of TPUs is of a step that ran attention's forward pass
twice: what is kept instead takes 12 MiB more for 32 rows and a block of DiT-B.

```bash
XLA_FLAGS=--xla_backend_optimization_level=0 python -m shortcut_jax.planning.scaling \\
    --config=configs/digits.py --config.batch_size=256 --config.model.hidden_size=128 \\
    --config.model.depth=2 --config.model.patch_size=1 --kept=docs/results/scaling.json
python -m shortcut_jax.planning.scaling --config=configs/imagenet.py:b \\
    --machines=v5e:2x2,v5e:2x4,v5e:4x4 --kept=docs/results/scaling.json    # libtpu; minutes
python -m shortcut_jax.planning.scaling_table docs/results/scaling.json > docs/scaling.md
```

## The least

With N bytes of parameters in the type that the network computes in (float32 on CPUs, bfloat16
elsewhere), f = `mesh.fsdp`, d = `mesh.data` and g passes that need the parameters, a device must
be sent

    dp (f = 1)   2 N (d-1)/d
    fsdp         g N (f-1)/f  +  N (f-1)/f  +  2 N/f (d-1)/d

by ring algorithms, which send the least: gradients are summed once; under fsdp the parameters are
gathered for every pass and dropped after it, and each device gets its part of the sum. A step of
the shortcut model has g = 4: two half-steps of the targets, forward, backward. Without the targets
it is the 2 of ZeRO-3. "Received" is the same measure of what the compiler sends: (n-1)/n of a
gathered result, (n-1) of a scattered one, both for a sum, all of a permute. The function is
`shortcut_jax.planning.communication.least`.

It is the least for a step that brings parameters to the rows and keeps none. A compiler may send
less: by keeping them from one pass to the next, with the memory that fsdp is there to save, or by
bringing few rows to large parameters.

## What the tables say

- **Data-parallel sends the least**: gradients once, and scalars. (The 1 % above it on TPUs is
  gradients in float32: of the table of labels and of the last layers of the time MLPs.) With
  the rows per device fixed (weak), FLOPs, memory and bytes accessed stay what they are on one
  device, and what is received grows towards 2 N and no further. With the batch fixed (strong),
  FLOPs fall as 1/n and what is received does not.
- **FLOPs are 1.02 to 1.03 times `flops.train_step`** on every mesh: nothing is computed twice, on
  no device. The rest is not matrix products. GFLOP is the least itself, and what else the compiler
  counts is left out, where layers are scanned: it counts the body of a loop once.
- **Fully sharded on CPUs is below the least** (0.76 to 0.84), because the unrolled program keeps
  what it gathers: the two half-steps share one gather, and so do forward and backward, 2 N instead
  of 4 N. It is not as low as that allows, 3 N: XLA's CPU compiler sums whole gradients on every
  device and cuts them afterwards, 2 N instead of N; that is the row "several, or not said". What
  is received for `split` is modulations, brought to their rows, where the kernel was not gathered.
- **Fully sharded on TPUs is at the least or below it** (0.92 on v5e:2x2, 0.98 on v5e:2x4, 0.95 on
  v5e:4x4), whether the batch grows with the devices or not. Below it is the modulation, a third of
  all parameters: in the targets and forward its kernel stays where it is and the rows go to it, one
  vector each. Above it are qkv, attention and MLP: the compiler passes shards round a ring while it
  multiplies (collective-permutes in a loop), 9 of them where 7 are needed on 8 chips, 17 for 15 on
  16; on 4 the 3 that are needed. Gradients are scattered, in bfloat16, but for one matrix on
  v5e:2x2 and v5e:4x4 that is summed whole and cut afterwards, which is 61 and 76 MiB more than it
  takes: the modulation's, joined with the biases (under `attention_out` below), and in two data
  groups on v5e:4x4 that of `mlp_in`, 47 MiB. There no rings are made, and the whole is 0.84 to 0.87
  of the least.
- **How much that is.** DiT-B/2 with 32 rows on each of 8 v5e: {compute:.0f} ms of matrix products
  at 40 % of the peak, beside {fsdp:.1f} ms for what fsdp receives and {dp:.1f} ms for the least of
  dp, if all links into a chip were busy and nothing overlapped (200 GB/s, half of what
  [v5e](https://docs.cloud.google.com/tpu/docs/v5e) has both ways). With one row on a chip products
  and links take alike.
"""


def main() -> None:
    """Prints the page."""
    path = ROWS.value or "docs/results/scaling.json"
    rows = scaling.read(Path(path))
    if not rows:
        raise UserError(
            f"{path} holds no row; expected what shortcut_jax.planning.scaling --kept={path} "
            "keeps: compile some steps first."
        )
    print(page(rows), end="")


if __name__ == "__main__":
    cli.main(main, functools.partial(cli.parse_flags, positional="rows"))
