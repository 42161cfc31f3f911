"""What the devices of a compiled program send each other, from its text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf" = (.+?) ({KINDS})(-start)?\(")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}


class Traffic(NamedTuple):
    """Of one kind of collective, in one run of a program.

    Attributes:
      calls: how often it runs.
      bytes: that a device sends, on a ring where it is reduced or gathered.
    """

    calls: int
    bytes: float


def count_collectives(text: str) -> dict[str, int]:
    """How often each collective stands in a compiled program; bodies of loops count once."""
    found = (kind for line in text.splitlines() for kind, _ in _collective(line))
    return dict(sorted(collections.Counter(found).items()))


def traffic(text: str) -> dict[str, Traffic]:
    """What the collectives of a compiled program send; bodies of loops as often as they run.

    A loop of which the compiler does not know how often it runs counts once, and of branches all.
    """
    computations, entry = _computations(text)
    found: dict[str, Traffic] = {}
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for line in computations.get(name, ()):
            for kind, sent in _collective(line):
                calls, total = found.get(kind, Traffic(0, 0.0))
                found[kind] = Traffic(calls + times, total + times * sent)
            todo += [(called, times * n) for called, n in _calls(line)]
    return dict(sorted(found.items()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that the program begins with."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if " while(" in line:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        for name in re.findall(r"body=%?([\w.-]+)", line):
            yield name, int(trips[1]) if trips else 1
        return
    for names in re.findall(r"(?:calls|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)", line):
        for name in names.split(", "):
            yield name.removeprefix("%"), 1


def _collective(line: str) -> Iterator[tuple[str, float]]:
    """The kind of an instruction, if it is a collective, and the bytes that a device sends."""
    if not (found := _INSTRUCTION.search(re.sub(r"/\*.*?\*/", "", line))):
        return
    shapes, kind, begins = found.groups()
    size, total = _group_size(line), _bytes(shapes)
    # Where it begins only, its shape has the operand before the result, but for all-reduce.
    result = {
        "all-gather": total * size / (size + 1),
        "reduce-scatter": total / (size + 1),
        "all-reduce": total,
    }.get(kind, total / 2)
    result = result if begins else total
    others = (size - 1) / size
    times = {"reduce-scatter": size - 1, "all-reduce": 2 * others, "collective-permute": 1}
    yield kind, result * times.get(kind, others)


def _bytes(shapes: str) -> float:
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shapes):
        digits = re.search(r"\d+", dtype)
        item = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 1)
        total += item * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _group_size(line: str) -> int:
    """How many devices take part together."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(tiled[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('[\w', ]+)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    return 2  # pairs
