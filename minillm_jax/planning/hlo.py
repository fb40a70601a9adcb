"""The text of a compiled program, read into computations and instructions."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Computation = dict[str, "Instruction"]  # by name

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|called_computations|branch_computations|"
    r"true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Shape:
    """An array: its numbers and where it is."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool  # in the memory of the core and not in that of the chip

    @property
    def bytes(self) -> int:
        """Bytes, without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) or int(digits[0] if digits else 0)
        return math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    arguments: str  # between the parentheses, as written
    attributes: str
    root: bool

    @cached_property
    def shapes(self) -> list[Shape]:
        """The arrays of its type, in order."""
        return [
            Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
            for dtype, dims, layout in _ARRAY.findall(self.type)
        ]

    @property
    def bytes(self) -> int:
        """Bytes of its value in the chip's memory."""
        return sum(shape.bytes for shape in self.shapes if not shape.fast)

    @property
    def where(self) -> str:
        """The path of named scopes that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The value of an attribute, empty if it has none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else ""

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """The computations that it names, by what they are for."""
        found: dict[str, list[str]] = {}
        for kind, many, one in _CALLED.findall(self.attributes):
            found.setdefault(kind, []).extend(re.findall(r"[\w.\-]+", many or one))
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a compiled module (`compiled.as_text()`) and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            i = _instruction(bool(found[1]), found[2], re.sub(r"/\*.*?\*/", "", found[3]))
            current[i.name] = i
    return computations, entry


def _instruction(root: bool, name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inner = rest[start + 1 : stop]
    operands = tuple(_NAME.findall(inner))
    return Instruction(name, kind, rest[:start], operands, inner, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no end of {text[start : start + 40]!r}")


def groups(i: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, by places in the mesh; of a permute its pairs."""
    if i.op.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes)
        return tuple((int(a), int(b)) for a, b in pairs if a != b) or ((0, 1),)
    given = re.search(r"replica_groups=(.*)", i.attributes)
    text = given[1] if given else ""
    if found := re.match(r"mesh\[(.*?)\]\s*\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = re.findall(r"'([^']+)'", found[2])
        mesh = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        order = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in chosen)
        size = math.prod(sizes[name] for name in chosen)
        return _tuples(mesh.transpose(order).reshape(-1, size))
    if found := re.match(r"\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text):
        count, size = int(found[1]), int(found[2])
        dims = [int(n) for n in (found[3] or str(count * size)).split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dims))
        return _tuples(np.arange(count * size).reshape(dims).transpose(order).reshape(count, size))
    if found := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", text):
        inner = re.findall(r"\{([\d,]+)\}", found[1])
        return tuple(tuple(int(n) for n in one.split(",")) for one in inner)
    return (tuple(range(devices)),)


def _tuples(rows: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, rows.tolist()))
