"""What the devices of a compiled program send each other, from its text."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf" = (.+?) ({KINDS})(-start)?\(")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}


class Traffic(NamedTuple):
    """Of one kind of collective, in one run of a program.

    Attributes:
      calls: how often it runs.
      bytes: that a device sends, on a ring where it is reduced or gathered.
      beyond: bytes that leave the host, of each of its devices, at the least.
    """

    calls: int
    bytes: float
    beyond: float


def without(whole: Traffic, part: Traffic | None) -> Traffic:
    """What is left of the traffic of one kind."""
    if part is None:
        return whole
    calls, sent, beyond = (a - b for a, b in zip(whole, part, strict=True))
    return Traffic(int(calls), sent, beyond)


def count_collectives(text: str) -> dict[str, int]:
    """How often each collective stands in a compiled program; bodies of loops count once."""
    found = (_INSTRUCTION.search(line) for line in _without_comments(text).splitlines())
    return dict(sorted(collections.Counter(match[2] for match in found if match).items()))


def _without_comments(text: str) -> str:
    """Without the numbers that the compiler puts into long tuples."""
    return re.sub(r"/\*.*?\*/", "", text)


def traffic(text: str, per_host: int, scope: str = "") -> dict[str, Traffic]:
    """What the collectives of a compiled program send; bodies of loops as often as they run.

    A loop of which the compiler does not know how often it runs counts once, and of branches all.

    Args:
      text: of the compiled program.
      per_host: how many devices are connected without a network.
      scope: of `jax.named_scope`: what is not in it does not count.
    """
    computations, entry = _computations(text)
    found: dict[str, Traffic] = {}
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for line in computations.get(name, ()):
            one = _INSTRUCTION.search(line)
            if one and re.search(rf'op_name="[^"]*{scope}' if scope else "", line):
                kind, (sent, beyond) = one[2], _sent(line, one, per_host)
                calls, total, total_beyond = found.get(kind, Traffic(0, 0.0, 0.0))
                found[kind] = Traffic(
                    calls + times, total + times * sent, total_beyond + times * beyond
                )
            todo += [(called, times * n) for called, n in _calls(line)]
    return dict(sorted(found.items()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that the program begins with."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in _without_comments(text).splitlines():
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


def _sent(line: str, found: re.Match[str], per_host: int) -> tuple[float, float]:
    """The bytes that each device sends for a collective, and those that leave its host."""
    shapes, kind, only_begins = found.groups()
    group = _group(line)
    size, hosts = len(group), len({device // per_host for device in group})
    total = _bytes(shapes)
    # Where it only begins, its shape has the operand before the result, but for all-reduce.
    whole = {
        "all-gather": total * size / (size + 1) if only_begins else total,
        "reduce-scatter": total * size / (size + 1) if only_begins else total * size,
        "all-reduce": total,
    }.get(kind, total / 2 if only_begins else total)
    times = 2 if kind == "all-reduce" else 1
    if kind == "collective-permute":
        return whole, whole if hosts > 1 else 0.0
    # What is reduced or gathered crosses the network once for all devices of a host.
    sharing = 1 if kind == "all-to-all" else size / hosts
    return times * whole * (size - 1) / size, times * whole * (hosts - 1) / hosts / sharing


def _bytes(shapes: str) -> float:
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shapes):
        digits = re.search(r"\d+", dtype)
        item = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 1)
        total += item * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _group(line: str) -> list[int]:
    """The devices that take part in a collective together: the first of the groups."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(device) for device in listed[1].split(",")]
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]
    if tiled := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(?:T\(([\d,]+)\))?", line):
        devices = _transposed(numbers(tiled[2]), numbers(tiled[3] or ""))
        return devices.reshape(numbers(tiled[1]))[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](.*?) ?\{('[\w', ]+)\}", line)
    if not mesh:
        raise ValueError(f"a collective whose groups have another form than those known: {line}")
    names, chosen = re.findall(r"'(\w+)'", mesh[1]), re.findall(r"'(\w+)'", mesh[3])
    sizes = [int(n) for n in re.findall(r"=(\d+)", mesh[1])]
    order = re.search(r"device_ids=\((\[[\d,]+\])(?:T\(([\d,]+)\))?", mesh[2])
    shape, axes = (order[1], order[2] or "") if order else (str(sizes), "")
    devices = _transposed(numbers(shape), numbers(axes)).reshape(sizes)
    first = devices[tuple(slice(None) if name in chosen else 0 for name in names)]
    return first.ravel().tolist()


def _transposed(shape: list[int], axes: list[int]) -> np.ndarray:
    """The devices in order, in this shape, whose axes are then permuted."""
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(axes) if axes else devices
