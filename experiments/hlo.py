"""Reads what a compiled program does from its text, where the compiler does not say it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What is no kernel: it names, bundles or awaits others' results.
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "bitcast",
    "tuple",
    "after-all",
    "partition-id",
)


class Traffic(NamedTuple):
    """What the kernels of a program ask of a device's memory.

    Attributes:
      bytes: read and written: each kernel's arguments, of which a slice counts alone where it reads
        no more, and results.
      kernels: how many there are.
    """

    bytes: int
    kernels: int


def traffic(text: str, passes: int = 1) -> Traffic:
    """Returns the traffic of a program for a GPU; what is in a loop counts `passes` times."""
    bodies, entry = _computations(text)

    def of(name: str, times: int) -> Traffic:
        sizes: dict[str, int] = {}
        total, kernels = 0, 0
        for line in bodies.get(name, "").splitlines():
            found = re.match(
                r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*?)\)(?:,|$)", line
            )
            if not found:
                continue
            own, shape, op, arguments = found.groups()
            sizes[own] = shape_bytes(shape)
            if op in FREE or op.endswith("-done"):
                continue
            if op in ("while", "call", "conditional", "async-start"):
                inside = re.findall(
                    r"(?:body|to_apply|calls|branch_computations|(?:true|false)_computation)="
                    r"\{?((?:%?[\w.-]+(?:, )?)+)",
                    line,
                )
                for called in ", ".join(inside).split(", "):
                    # Of loops in loops nothing is known.
                    part = of(called.lstrip("%"), passes if op == "while" else times)
                    total, kernels = total + part.bytes, kernels + part.kernels
                continue
            fused = re.search(r"calls=%?([\w.-]+)", line)
            body = bodies.get(fused[1], "") if fused else ""
            names = [argument.split("%")[-1].strip() for argument in arguments.split(",")]
            read = sum(_read(body, i, sizes.get(name, 0)) for i, name in enumerate(names))
            total += times * (sizes[own] + read)
            kernels += times
        return Traffic(total, kernels)

    return of(entry, 1)


def collective_bytes(text: str, passes: int = 1) -> int:
    """Returns the bytes of the results of all collectives in the text of a compiled program.

    Those in a loop, or in what it calls, count `passes` times. One that is started and awaited, or
    stands in several fusions, counts once, by its channel.
    """
    bodies, _ = _computations(text)
    looped, found = set(), set(re.findall(r"\bbody=%?([\w.-]+)", text))
    while found:
        looped |= found
        called = {name for body in found for name in re.findall(r"%([\w.-]+)", bodies[body])}
        found = (called & bodies.keys()) - looped
    total, names, counted = 0, "|".join(COLLECTIVES), set()
    for name, body in bodies.items():
        for shapes, started, rest in re.findall(rf"= (.*?) (?:{names})(-start)?\((.*)", body):
            channel = re.search(r"channel_id=(\d+)", rest)
            if channel and channel[1] in counted:
                continue
            counted |= {channel[1]} if channel else set()
            sizes = _sizes(shapes)
            # The result of one that is started may hold its operands, too.
            size = max(sizes, default=0) if started else sum(sizes)
            total += size * (passes if name in looped else 1)
    return total


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape as HLO writes it, such as `(f32[2,3]{1,0}, pred[])`."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    return [_bytes(*one) for one in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)]


def _bytes(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def _computations(text: str) -> tuple[Mapping[str, str], str]:
    """Returns the bodies of all computations by name, and the name of the one that is run."""
    parts = re.findall(r"^(ENTRY )?%?([\w.-]+) \(.*\{\n((?:.*\n)*?)\}", text, re.MULTILINE)
    entry = next((name for first, name, _ in parts if first), "")
    return {name: body for _, name, body in parts}, entry


def _read(body: str, index: int, whole: int) -> int:
    """Returns how many bytes of an argument a fusion reads."""
    parameter = re.search(rf"%?([\w.-]+) = ([^=]*?) parameter\({index}\)", body)
    if not parameter:
        return whole
    each = whole / max(1, _elements(parameter[2]))

    def read(name: str) -> float:
        """How many numbers; infinitely many is all."""
        used, total = re.compile(rf"[(, ]%?{re.escape(name)}[,)]"), 0.0
        for line in body.splitlines():
            left, _, right = line.partition(" = ")
            shape, _, operation = right.partition(" ")
            if not used.search(right):
                continue
            if operation.startswith(("slice(", "dynamic-slice(")):
                total += _elements(shape)
            elif operation.startswith(("convert(", "bitcast(")):
                total += read(left.split("%")[-1].strip())
            else:
                return math.inf
        return total

    return int(min(whole, each * read(parameter[1])))


def _elements(shape: str) -> int:
    found = re.search(r"\[([\d,]*)\]", shape)
    return math.prod(int(side) for side in found[1].split(",") if side) if found else 0
