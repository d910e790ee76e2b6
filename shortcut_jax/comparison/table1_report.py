"""What `shortcut_jax.table1` has found so far: table, orderings, curves and pictures."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from shortcut_jax import metrics, pictures
from shortcut_jax.comparison.budget import Budget
from shortcut_jax.comparison.experiment import results, spread, values
from shortcut_jax.comparison.paper_results import DATASETS, STEPS, TABLE_1
from shortcut_jax.files import write_atomically
from shortcut_jax.objectives import OBJECTIVES


def budgets(found: Mapping[str, Budget]) -> str:
    """What each row spends, as text."""
    lines = [f"{'network evaluations':<26}{'total':>14}{'teacher':>14}{'pairs':>14}{'updates':>9}"]
    for row, b in found.items():
        spent = "".join(f"{n:>14,.0f}" for n in (b.total, b.teacher, b.pairs))
        lines.append(f"{row:<26}{spent}{b.updates:>9,} of {b.per_update:,.0f}")
    return "\n".join(lines)


def write(workdir: Path, config: ConfigDict) -> None:
    """Writes table1.{json,md}, curves.png and samples.png of rows measured as `config` says."""
    names = list(OBJECTIVES)
    done = sorted(results(workdir, config), key=lambda d: (names.index(d["name"]), d["seed"]))
    if not done:
        return
    summary = summarise(done)
    write_atomically(workdir / "table1.json", json.dumps(summary, indent=1).encode())
    write_atomically(workdir / "table1.md", markdown(summary).encode())
    metric, rows = next(iter(summary["metrics"].items()))
    points = {
        row: [(int(n), float(np.mean(found))) for n, found in by_steps.items()]
        for row, by_steps in rows.items()
    }
    pictures.curve(points, workdir / "curves.png", metric, f"{summary['data']}, mean of seeds")
    _write_grid(workdir, done)


def summarise(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of table1.json from the RESULTs of the rows, ordered by row and seed."""
    records = [record for row in done for record in row["records"]]
    # The Inception score compares with nothing and says nothing of a reference.
    example = next((record for record in records if "reference" in record), records[0])
    protocol: dict[str, Any] = {key: example[key] for key in PROTOCOL if key in example}
    protocol["commit"] = ", ".join(dict.fromkeys(record["commit"] for record in records))
    rows: dict[str, Any] = {}
    for row in done:
        budget = Budget(**row["budget"])
        spent = row["budget"] | {"total": budget.total}
        entry = rows.setdefault(row["name"], {"budget": spent, "seeds": []})
        entry["seeds"].append(row["seed"])
    return {
        "data": done[0]["config"]["data.name"],
        "protocol": protocol,
        "rows": rows,
        "metrics": values(done),
    }


PROTOCOL = (
    "num_samples", "params", "ema_rate", "quantisation", "resize", "reference", "reference_size",
    "dtype", "backend", "commit", "jax",
)  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """The table, what was spent, and which of the paper's orderings hold."""
    parts = [_protocol_text(summary)]
    for metric, rows in summary["metrics"].items():
        parts += [f"### {metric}{_direction(metric)}", _table(rows)]
    parts += ["### Compute", _compute(summary["rows"])]
    for metric, rows in summary["metrics"].items():
        higher = metrics.higher_is_better(metric)
        parts.append(f"### The paper's orderings in {metric}{_direction(metric)}")
        parts += [_claims(rows, higher), _orderings(rows, higher)]
    return "\n\n".join(parts) + "\n"


def _direction(metric: str) -> str:
    """Said of what is no distance, whose numbers are read the other way round."""
    return " (higher is better)" if metrics.higher_is_better(metric) else ""


def _protocol_text(summary: Mapping[str, Any]) -> str:
    p = summary["protocol"]
    return (
        f"Data set {summary['data']}; {p['num_samples']:,} samples of the {p['params']} parameters"
        f"{_against(p)}; {p['dtype']} on {p['backend']}, jax {p['jax']}, commit {p['commit']}. "
        "Left the paper's FID-50k of DiT-B "
        "(in parentheses: not made for this number of steps; with a question mark: unverified), "
        "right ours: mean ± half the range over the seeds, whose number stands behind the name."
    )


def _against(protocol: Mapping[str, Any]) -> str:
    if "reference" not in protocol:
        return ""
    size = protocol["reference_size"]  # None where the statistics of others do not say
    number = "an unknown number of" if size is None else f"{size:,}"
    return f" against {number} images of {protocol['reference']}"


def _table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    head = [f"{name} {n}" for name in (*DATASETS, "ours") for n in STEPS]
    lines = [f"| | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    for row in OBJECTIVES:
        if row not in rows:
            continue
        paper = [str(c) for cells in TABLE_1.get(row, ()) for c in cells] or [""] * 6
        ours = [spread(rows[row].get(str(n), [])) for n in STEPS]
        seeds = len(next(iter(rows[row].values())))
        lines.append(f"| {row} ({seeds}) | {' | '.join(paper + ours)} |")
    return "\n".join(lines)


def _compute(rows: Mapping[str, Any]) -> str:
    lines = [
        "| | network evaluations | of the teacher | of pairs | updates | each |",
        "|---|---|---|---|---|---|",
    ]
    for row, entry in rows.items():
        b = entry["budget"]
        lines.append(
            f"| {row} | {b['total']:,.0f} | {b['teacher']:,.0f} | {b['pairs']:,.0f} | "
            f"{b['updates']:,} | {b['per_update']:,.0f} |"
        )
    return "\n".join(lines)


def orderings(
    rows: Mapping[str, Mapping[str, Sequence[float]]], dataset: int, higher_is_better: bool = False
) -> dict[int, dict[str, list[tuple[str, str]]]]:
    """The paper's pairwise orderings on a data set, sorted by whether ours agree.

    Args:
      rows: row -> sampling steps -> values over seeds.
      dataset: index into DATASETS.
      higher_is_better: of our metric; the paper's is the FID, a distance.

    Returns:
      Sampling steps -> "hold", "within noise" or "do not hold" -> pairs (better, worse) in the
      paper. Ours are within noise if the ranges over the seeds overlap; with one seed nothing is.
    """
    found = {}
    for column, steps in enumerate(STEPS):
        sorted_pairs: dict[str, list[tuple[str, str]]] = {
            "hold": [], "do not hold": [], "within noise": [],
        }  # fmt: skip
        for a, b in itertools.combinations(TABLE_1, 2):
            cells = TABLE_1[a][dataset][column], TABLE_1[b][dataset][column]
            better, worse = (a, b) if cells[0].value < cells[1].value else (b, a)
            if str(steps) not in rows.get(better, {}) or str(steps) not in rows.get(worse, {}):
                continue
            low, high = rows[better][str(steps)], rows[worse][str(steps)]
            if higher_is_better:
                low, high = high, low
            if max(low) < min(high):
                sorted_pairs["hold"].append((better, worse))
            elif min(low) > max(high):
                sorted_pairs["do not hold"].append((better, worse))
            else:
                sorted_pairs["within noise"].append((better, worse))
        found[steps] = sorted_pairs
    return found


def claims(
    rows: Mapping[str, Mapping[str, Sequence[float]]], higher_is_better: bool = False
) -> dict[str, bool]:
    """What the paper's table says in short, each checked beyond the noise of the seeds.

    Args:
      rows: row -> sampling steps -> values over seeds. Claims about rows that are missing are left
        out.
      higher_is_better: of our metric. Where the paper's distance is below a fifth of another, such
        a metric has to be better, by whatever factor.
    """
    found: dict[str, bool] = {}

    def better(row: str, other: str, steps: int, fifth: bool = False) -> None:
        if str(steps) not in rows.get(row, {}) or str(steps) not in rows.get(other, {}):
            return
        ours, theirs = rows[row][str(steps)], rows[other][str(steps)]
        if higher_is_better:
            found[f"at {steps} steps {row} is above {other}"] = min(ours) > max(theirs)
        else:
            text, factor = ("below a fifth of", 1 / 5) if fifth else ("below", 1)
            found[f"at {steps} steps {row} is {text} {other}"] = max(ours) < factor * min(theirs)

    better("shortcut", "flow_matching", 1, fifth=True)
    better("shortcut", "consistency_training", 1)
    better("shortcut", "live_reflow", 1)
    better("shortcut", "flow_matching", 4)
    if all("128" in rows.get(row, {}) for row in ("shortcut", "flow_matching")):
        ours, theirs = (np.mean(rows[row]["128"]) for row in ("shortcut", "flow_matching"))
        name = "at 128 steps the mean of shortcut is within 15 % of flow_matching, or better"
        found[name] = bool(ours > 0.85 * theirs if higher_is_better else ours < 1.15 * theirs)
    better("progressive_distillation", "flow_matching", 1, fifth=True)
    better("flow_matching", "progressive_distillation", 128, fifth=True)
    return found


def _claims(rows: Mapping[str, Mapping[str, Sequence[float]]], higher: bool) -> str:
    return "\n".join(
        f"- {text}: {'yes' if holds else '**no**'}" for text, holds in claims(rows, higher).items()
    )


def _orderings(rows: Mapping[str, Mapping[str, Sequence[float]]], higher: bool) -> str:
    lines, sign = [], ">" if higher else "<"
    for index, dataset in enumerate(DATASETS):
        for steps, kinds in orderings(rows, index, higher).items():
            counts = ", ".join(f"{len(pairs)} {kind}" for kind, pairs in kinds.items())
            lines.append(f"- {dataset}, {steps} steps: {counts}.")
            for kind in ("do not hold", "within noise"):
                named = "; ".join(f"{a} {sign} {b}" for a, b in kinds[kind])
                lines += [f"  - {kind}: {named}"] if named else []
    return "\n".join(lines)


def _write_grid(workdir: Path, done: Sequence[Mapping[str, Any]]) -> None:
    """samples.png: a row per method, a column per number of steps, all from the same noise."""
    seed = min(row["seed"] for row in done)
    columns: dict[int, list[np.ndarray]] = {}
    for row in done:
        if row["seed"] == seed:
            path = workdir / f"seed_{seed}" / row["name"] / "samples.npz"
            with np.load(path, allow_pickle=False) as samples:
                for steps in samples.files:
                    columns.setdefault(int(steps), []).append(samples[steps][0])
    grid = {steps: np.stack(images) for steps, images in columns.items()}
    names = [row["name"] for row in done if row["seed"] == seed]
    pictures.sample_grid(grid, workdir / "samples.png", rows=len(names), names=names)
