"""What a compiled program sends between devices, read off its text."""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = (
    "all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    "|reduce-scatter"
)
_COLLECTIVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)  # noqa: E501
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip


class Collective(NamedTuple):
    """One operation: its kind, the bytes of its result on a device, how often a step runs it."""

    kind: str
    size: int
    times: int


def collectives(program: str) -> list[Collective]:
    """The collective operations of a compiled program.

    Args:
      program: `jax.stages.Compiled.as_text()`.

    Returns:
      One entry for each kind and size in each computation. What a loop runs counts as often as its
      body does, once where the compiler does not know; of a conditional every branch counts.
    """
    computations, entry = _computations(program)

    @functools.cache
    def inside(name: str) -> Counter[tuple[str, int]]:
        found: Counter[tuple[str, int]] = Counter()
        for line in computations.get(name, ()):
            operation = _operation(line)
            if operation:
                found[operation] += 1
            times = _trips(line, computations) if " while(" in line else 1
            for callee in _callees(line):
                for key, count in inside(callee).items():
                    found[key] += times * count
        return found

    return [Collective(kind, size, times) for (kind, size), times in inside(entry).items()]


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> how many operations a step runs, and their bytes together."""
    totals: dict[str, tuple[int, int]] = {}
    for kind, size, times in found:
        count, total = totals.get(kind, (0, 0))
        totals[kind] = (count + times, total + times * size)
    return dict(sorted(totals.items()))


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of the computations, and the name of the one that is the program."""
    found: dict[str, list[str]] = {"": []}
    name = entry = ""
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header["name"]
            found[name] = []
            entry = name if header["entry"] else entry
        else:
            found[name].append(line)
    return found, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs; 1 if the text does not say."""
    known = _KNOWN_TRIPS.search(line)
    if known:
        return int(known[1])
    # TPU programs say it by the condition alone: counter < constant, as `jax.lax.scan` counts.
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    limits = [match[1] for match in map(_LIMIT.search, lines) if match]
    below = any("direction=LT" in text for text in lines)
    return int(limits[0]) if below and len(limits) == 1 else 1


def _callees(line: str) -> list[str]:
    names = []
    for called in _CALLED.findall(line):
        names += [name.strip().lstrip("%") for name in called.strip("{}").split(",")]
    return names


def _operation(line: str) -> tuple[str, int] | None:
    match = _COLLECTIVE.search(line)
    if not match:
        return None
    sizes = [
        _ITEM_BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in _ARRAY.findall(match["shapes"])
    ]
    if match["start"] and match["kind"] in ("all-gather", "collective-permute"):
        # The result of these holds what was sent, too: (sent, received, ...).
        sizes = [sizes[1]] if len(sizes) in (2, 4) else sizes[len(sizes) // 2 :]
    return match["kind"], sum(sizes)
