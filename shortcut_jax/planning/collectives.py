"""What a compiled program sends between devices, read off its text."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
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
)
_FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r" get-tuple-element\(.*index=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip


class Collective(NamedTuple):
    """One operation of a device.

    Attributes:
      kind: the name in HLO.
      size: bytes of its result.
      times: how often a step runs it.
      group: how many devices take part in it.
      source: what in the network it is of, by the compiler's metadata; "" if that says nothing.
    """

    kind: str
    size: int
    times: int
    group: int
    source: str = ""

    @property
    def received(self) -> float:
        """Bytes that the device is sent in a step by ring algorithms, which send the least.

        (n - 1)/n of a result that is gathered, n - 1 times one that is scattered, and both, one
        after the other, for a sum that everyone gets.
        """
        n = self.group
        factor = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * factor * self.size


def collectives(program: str) -> list[Collective]:
    """The collective operations of a compiled program.

    Args:
      program: `jax.stages.Compiled.as_text()`.

    Returns:
      One entry for all that are alike in a computation. What a loop runs counts as often as its
      body does, once where that is not known; of a conditional every branch counts. What a TPU
      sums and then cuts is a reduce-scatter.
    """
    computations, entry = _computations(program)
    partitions = _PARTITIONS.search(program)
    devices = int(partitions[1]) if partitions else 1
    started = _started(computations)

    @functools.cache
    def inside(name: str) -> Counter[Collective]:
        found: Counter[Collective] = Counter()
        for line, fusion, context in _lines(name, computations):
            operation = _operation(line, fusion, context, devices)
            if operation and started.get(_channel(line), fusion) == fusion:
                found[operation] += 1
            times = _trips(line, computations)
            for callee in _callees(line):
                for key, count in inside(callee).items():
                    found[key] += times * count
        return found

    return [each._replace(times=times) for each, times in inside(entry).items()]


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> how many operations a step runs, and the bytes of their results together."""
    totals: dict[str, tuple[int, int]] = {}
    for each in found:
        count, total = totals.get(each.kind, (0, 0))
        totals[each.kind] = (count + each.times, total + each.times * each.size)
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


def _started(computations: dict[str, list[str]]) -> dict[str, str]:
    """Channel -> fusion that starts it, of what a TPU spreads over fusions to overlap with others.

    Each of these fusions, some of them in inner loops, names the whole operation again.
    """
    return {
        _channel(line): name
        for name, lines in computations.items()
        if any('"AsyncCollectiveStart"' in line for line in lines)
        for line in lines
        if _COLLECTIVE.search(line)
    }


def _channel(line: str) -> str:
    match = _CHANNEL.search(line)
    return match[1] if match else ""


def _lines(
    name: str, computations: dict[str, list[str]], fusion: str = "", context: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Lines of a computation and of its fusions, each with the name of the fusion and its line."""
    for line in computations.get(name, ()):
        called = _FUSION.search(line)
        if called:
            yield from _lines(called[1], computations, called[1], line)
        else:
            yield line, fusion, context


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often what a line calls runs: for a loop as often as its body; 1 if nothing says."""
    loop = _WHILE.search(line)
    known = _KNOWN_TRIPS.search(line)
    if not loop or known:
        return int(known[1]) if known else 1
    # TPU programs say it by the condition alone: counter < constant. The counter starts at 0.
    condition = computations.get(loop[1], [])
    limits = list(_constants(condition).values())
    below = any("direction=LT" in text for text in condition)
    if not below or len(limits) != 1:
        return 1
    return -(-limits[0] // _step(condition, computations.get(loop[2], [])))


def _step(condition: list[str], body: list[str]) -> int:
    """By how much the body of a loop raises its counter: more than 1 where it is unrolled."""
    indices = [int(match[1]) for match in map(_ELEMENT.search, condition) if match]
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    results = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    if len(indices) != 1 or indices[0] >= len(results):
        return 1
    counter = next((line for line in body if f"%{results[indices[0]]} = " in line), "")
    added = re.search(r" add\(([^)]*)\)", counter)
    constants = _constants(body)
    names = re.findall(r"%([\w.\-]+)", added[1]) if added else []
    return next((constants[name] for name in names if name in constants), 1)


def _constants(lines: list[str]) -> dict[str, int]:
    """Name -> value of the whole numbers that a computation holds."""
    return {match[1]: int(match[2]) for match in map(_CONSTANT.search, lines) if match}


def _callees(line: str) -> list[str]:
    names = []
    for called in _CALLED.findall(line):
        names += [name.strip().lstrip("%") for name in called.strip("{}").split(",")]
    return names


def _operation(line: str, fusion: str, context: str, devices: int) -> Collective | None:
    match = _COLLECTIVE.search(line)
    if not match:
        return None
    kind, group = match["kind"], _group(line, devices)
    sizes = [
        _ITEM_BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in _ARRAY.findall(match["shapes"])
    ]
    if match["start"] and kind in ("all-gather", "collective-permute"):
        # The result of these holds what was sent, too: (sent, received, ...).
        sizes = [sizes[1]] if len(sizes) in (2, 4) else sizes[len(sizes) // 2 :]
    size = sum(sizes)
    if fusion.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // group
    source = _SOURCE.search(line) or _SOURCE.search(context)
    return Collective(kind, size, 1, group, source[1] if source else "")


def _group(line: str, devices: int) -> int:
    """How many devices an operation is among; there are four ways to write it."""
    groups = line.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([\d,]+)\}", groups)  # {{0,1},{2,3}}
    if listed:
        return len(listed[1].split(","))
    shaped = re.match(r"\[\d+,(\d+)\]<=", groups)  # [2,4]<=[8]: 2 groups of 4
    if shaped:
        return int(shaped[1])
    mesh = re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups)  # mesh['a'=2,'b'=4] {'a'}
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A part of an axis is 'a':(1)2, of size 2.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
