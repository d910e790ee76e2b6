"""What `shortcut_jax.gpu_benchmark` has found: its files, and the text at the end."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortcut_jax.benchmarks import Failure, Measurement
from shortcut_jax.files import read_json, write_atomically

WANTED_MFU = 0.5  # of the step of DiT-XL/2


@dataclasses.dataclass
class Content:
    """The file of a part, written again with every number.

    Attributes:
      part: its name.
      machine: versions and device.
      measurements, failures: so far.
      seconds: that it took, when it has ended; None before.
    """

    part: str
    machine: dict[str, Any]
    measurements: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float | None = None

    def add(self, path: Path, found: Measurement | Failure) -> None:
        """Adds a number or a failure, and writes."""
        target = self.failures if isinstance(found, Failure) else self.measurements
        target.append(dataclasses.asdict(found))
        self.write(path)

    def end(self, path: Path, seconds: float) -> None:
        """Says that the part has ended, and writes."""
        self.seconds = seconds
        self.write(path)

    def write(self, path: Path) -> None:
        """Writes the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())


def read(path: Path) -> Content | None:
    """What a part has found so far, if it was ever begun."""
    return Content(**read_json(path, "what a part has found")) if path.exists() else None


def ended(path: Path) -> bool:
    """Whether a part has run to its end with nothing that failed but for want of memory."""
    content = read(path)
    if content is None or content.seconds is None:
        return False
    return all(failure["too_large"] for failure in content.failures)


def add_failure(path: Path, part: str, error: str) -> None:
    """Says in the file of a part that its process has failed."""
    (read(path) or Content(part, {})).add(path, Failure(part, error))


def line(found: Measurement | Failure) -> str:
    """Of the table that is printed as numbers come."""
    if isinstance(found, Failure):
        return f"{found.name:<56} {_verdict(found.too_large)}: {_shortened(found.error)}"
    low, high = found.spread
    verdict = {True: " ok", False: " FAILED", None: ""}[found.conditions.get("passed")]
    value = f"{found.value:>10.4g}  {low:>10.4g} {high:>10.4g}"
    return f"{found.name:<56} {value}  {found.unit}{verdict}"


def report(out: Path) -> tuple[str, bool]:
    """The text of all parts that there are, and whether nothing has failed."""
    contents = [read(path) for path in sorted(out.glob("*.json"))]
    found = {c.part: c for c in contents if c is not None}
    numbers = {m["name"]: m for c in found.values() for m in c.measurements}
    failures = [f for c in found.values() for f in c.failures]
    checks = {name: m for name, m in numbers.items() if "passed" in m["conditions"]}
    wrong = [m for m in checks.values() if not m["conditions"]["passed"]]
    lines = ["", f"checks: {len(checks) - len(wrong)} of {len(checks)} passed"]
    lines += [
        f"  FAILED {m['name']}: {m['value']:.3g}, at most {m['conditions']['bound']:.3g}"
        for m in wrong
    ]
    for part in ("xl2", "b2"):
        if part in found:
            lines += ["", *_variants(part, numbers), *_comparison(part, numbers)]
    for name, m in numbers.items():
        if name.startswith(("sample/", "metrics/")) and m["unit"].endswith(" / s"):
            lines.append(f"{name:<56} {m['value']:>10.4g}  {m['unit']}")
    lines += [f"{_verdict(f['too_large'])} {f['name']}: {_shortened(f['error'])}" for f in failures]
    seconds = ", ".join(f"{c.part} {c.seconds or 0:.0f} s" for c in found.values())
    machine = next((c.machine for c in found.values() if c.machine), {})
    lines += ["", f"took: {seconds}", f"on: {machine}"]
    return "\n".join(lines), not wrong and all(f["too_large"] for f in failures)


def write_text(path: Path, text: str) -> None:
    """Writes the report."""
    write_atomically(path, f"{text}\n".encode())


def _verdict(too_large: bool) -> str:
    return "DOES NOT FIT" if too_large else "FAILED"


def _shortened(error: str) -> str:
    return error.splitlines()[0][:200]


def _variants(part: str, numbers: Mapping[str, Any]) -> list[str]:
    """A line for every way to compute the step; the fastest has a star."""
    winner = numbers.get(f"{part}: winner")
    best = winner["conditions"]["variant"] if winner else ""
    lines = [f"  {part:<44} {'rows / s':>10} {'MFU':>6} {'peak, GB':>9} {'compiled, s':>12}"]
    for name, m in numbers.items():
        prefix, _, what = name.rpartition(": ")
        if what != "rows" or not prefix.startswith(f"{part}/"):
            continue
        mfu, peak = (numbers[f"{prefix}: {w}"]["value"] for w in ("MFU", "peak memory"))
        seconds = numbers[f"{prefix}: compilation"]["value"]
        star = "*" if prefix.endswith(f"/{best}") and "shortcut" in prefix else " "
        what = prefix.removeprefix(f"{part}/")
        lines.append(
            f"{star} {what:<44} {m['value']:>10.4g} {mfu:>6.1%} {peak:>9.1f} {seconds:>12.0f}"
        )
    if winner and part == "xl2":
        mfu = numbers[f"{part}/shortcut_1_4/{best}: MFU"]["value"]
        verdict = "at least" if mfu >= WANTED_MFU else "BELOW"
        lines.append(f"  MFU of {best}: {mfu:.1%}, {verdict} the {WANTED_MFU:.0%} that are wanted")
    return lines


def _comparison(part: str, numbers: Mapping[str, Any]) -> list[str]:
    """Ours beside others at the same batch."""
    same = numbers.get(f"{part}: same batch")
    if same is None:
        return []
    lines, variant = [], same["conditions"]["variant"]
    for objective in ("flow_matching", "shortcut_1_4"):
        ours = numbers.get(f"{part}/{objective}/{variant}: rows")
        for other in ("torch", "authors"):
            theirs = numbers.get(f"{other}_{part}/{objective}: rows")
            if ours and theirs:
                ratio = ours["value"] / theirs["value"]
                lines.append(
                    f"  {objective}, batch {same['conditions']['batch_size']}: ours "
                    f"{ours['value']:.4g} rows / s, {other} {theirs['value']:.4g}: {ratio:.2f} x"
                )
    return lines
