"""Floating-point operations, bytes and collectives of a compiled program, from its text.

XLA's own figures count the body of a loop once. Here every computation counts as often as it runs:
a loop by the bound in its condition, or, where that depends on data, by what the caller assumes.
Only matrix products count as operations: the rest is bound by memory, whose bytes are counted.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from minillm_jax.planning.hlo import Instruction, groups, parse
from minillm_jax.planning.products import operations

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

# No work of their own: names of values, or counted with what they call or start.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier optimization-barrier iota async-start async-update".split()
)


@dataclass(frozen=True)
class Work:
    """What one instruction costs a device each time, and how often it runs."""

    where: str
    times: float
    flops: float = 0.0
    bytes: float = 0.0
    collective: str = ""  # its kind
    moved: float = 0.0  # bytes of the larger side of a collective
    groups: tuple[tuple[int, ...], ...] = ((0,),)  # of devices that take part in one of it


def _cost(run: list[Work]) -> tuple[float, float]:
    """FLOPs and bytes of one branch, by which the dearest is found: it is the one that counts."""
    return sum(w.times * w.flops for w in run), sum(w.times * w.bytes for w in run)


@dataclass
class Counter:
    """A compiled program for so many devices."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    devices: int = 1
    unknown: list[str] = field(default_factory=list)  # loops whose trips were assumed

    def work(self, assume: Callable[[str, int], float] | None = None) -> list[Work]:
        """All work of one run.

        `assume(where, depth)` gives the trips of a loop that depends on data, `depth` of which it
        is inside; without it such a loop counts once.
        """
        self.unknown = []
        return list(self._walk(self.entry, 1.0, assume or (lambda where, depth: 1.0), 0))

    def _walk(self, name: str, times: float, assume, depth: int) -> Iterator[Work]:
        computation = self.computations[name]
        for i in computation.values():
            if i.op == "while":
                trips = self.trips(computation, i)
                inside = depth
                if trips is None:
                    trips, inside = assume(i.where, depth), depth + 1
                    self.unknown.append(i.where)
                for kind in ("body", "condition"):
                    yield from self._walk(i.called[kind][0], times * trips, assume, inside)
            elif i.op == "fusion" or "custom-call" in i.op:
                collectives = 0
                for one in self._inside(i):
                    collectives += bool(one.collective)
                    yield replace(one, times=times)
                flops = self._flops_of(i) + operations(computation, i)
                yield Work(
                    i.where, times, flops, 0.0 if collectives else self._traffic(computation, i)
                )
            elif i.op == "conditional":
                branches = [name for names in i.called.values() for name in names]
                runs = [list(self._walk(name, times, assume, depth)) for name in branches]
                yield from max(runs, key=_cost)
            elif i.op in ("call", "async-start"):
                for names in i.called.values():
                    for called in names:
                        yield from self._walk(called, times, assume, depth)
            elif one := self._collective(computation, i):
                yield replace(one, times=times)
            elif i.op not in _FREE and not i.op.endswith("-done"):
                yield Work(i.where, times, operations(computation, i), self._moved(computation, i))

    def carried(self, kinds: Collection[tuple[int, int]]) -> int:
        """Bytes of the caches [B, K, S, h] with (S, h) in `kinds` that a loop takes round."""
        found = [0]
        for computation in self.computations.values():
            for i in computation.values():
                if i.op == "while":
                    arrays = [s for s in i.shapes if len(s.dims) == 4 and s.dims[2:] in kinds]
                    found.append(sum(s.bytes for s in arrays))
        return max(found)

    def trips(self, computation: Mapping[str, Instruction], loop: Instruction) -> int | None:
        """How often a loop runs, or None where its condition is not one counter and one bound."""
        condition = self.computations[loop.called["condition"][0]]
        test = _root(condition)
        while test.op in ("bitcast", "copy", "convert") and test.operands:
            test = condition[test.operands[0]]
        if test.op == "fusion":  # the comparison alone, on what is handed in
            inner = _root(self.computations[test.called["calls"][0]])
            if inner.op != "compare" or len(test.operands) != 2:
                return None
            test = replace(inner, operands=test.operands)
        if test.op != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (condition.get(name) for name in test.operands)
        if counter is None or bound is None or counter.op != "get-tuple-element":
            return None
        place = int(counter.attribute("index"))
        start = _number(computation, _element(computation, loop.operands[0], place))
        end = _number(condition, bound.name)
        if end is None and bound.op == "get-tuple-element":  # the bound is handed round the loop
            handed = _element(computation, loop.operands[0], int(bound.attribute("index")))
            end = _number(computation, handed)
        if end is None:
            return None
        step = self._step(loop.called["body"][0], place)
        return max(0, -(-(end - (start or 0)) // step))

    def _step(self, body: str, place: int) -> int:
        computation = self.computations[body]
        root = _root(computation)
        name = root.operands[place] if root.op == "tuple" and place < len(root.operands) else None
        found = computation.get(name or "")
        if found and found.op == "add":
            numbers = [_number(computation, operand) for operand in found.operands]
            return next((n for n in numbers if n), 1)
        return 1

    def _inside(self, outer: Instruction) -> Iterator[Work]:
        """Collectives that a fusion has swallowed."""
        for names in outer.called.values():
            for name in names:
                computation = self.computations.get(name, {})
                for i in computation.values():
                    if one := self._collective(computation, i):
                        yield one
                    elif i.op == "fusion":
                        yield from self._inside(i)

    def _collective(self, computation: Mapping[str, Instruction], i: Instruction) -> Work | None:
        kind = i.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        given = sum(s.bytes for o in i.operands if o in computation for s in computation[o].shapes)
        sizes = [shape.bytes for shape in i.shapes]
        # A start carries its operands along: all but them is the result.
        made = max(sizes, default=0) if i.op.endswith("-start") else sum(sizes)
        return Work(i.where, 1.0, 0.0, 0.0, kind, max(given, made), groups(i, self.devices))

    # Operations.

    def _flops_of(self, outer: Instruction) -> float:
        """Operations of everything that a fusion or a custom call runs."""
        total = 0.0
        for names in outer.called.values():
            for name in names:
                computation = self.computations.get(name, {})
                for i in computation.values():
                    total += self._flops_of(i) if i.called else operations(computation, i)
        return total

    # Bytes.

    def _traffic(self, outside: Mapping[str, Instruction], i: Instruction) -> float:
        """Bytes that a fusion reads and writes: of a sliced operand the slice alone."""
        if "AllocateBuffer" in i.attributes:
            return 0.0
        names = i.called.get("calls") or i.called.get("called_computations")
        if not names or names[0] not in self.computations:  # a kernel: all it is given and gives
            return self._moved(outside, i)
        computation = self.computations[names[0]]
        total = float(min(i.bytes, self._written(computation, _root(computation))))
        for parameter in computation.values():
            if parameter.op == "parameter":
                given = outside.get(i.operands[int(parameter.arguments)])
                if given is None or given.bytes:  # not in the memory of the core
                    total += self._read(computation, parameter)
        return total

    def _read(self, computation: Mapping[str, Instruction], value: Instruction) -> float:
        """Bytes read of a value that a fusion is given, at most all of it once."""
        if not value.bytes:
            return 0.0
        total = 0.0
        for user in computation.values():
            for place, name in enumerate(user.operands):
                if name == value.name:
                    total += self._use(computation, user, place, value)
        return min(total, float(value.bytes))

    def _use(self, computation, user: Instruction, place: int, value: Instruction) -> float:
        if user.op in ("dynamic-slice", "slice", "gather"):
            return float(sum(s.bytes for s in user.shapes)) if place == 0 else 0.0
        if user.op in ("dynamic-update-slice", "scatter") and place == 0:
            return 0.0
        if user.op == "bitcast":
            return float(value.bytes) if user.root else self._read(computation, user)
        if user.op == "fusion" and "calls" in user.called:
            inner = self.computations[user.called["calls"][0]]
            for parameter in inner.values():
                if parameter.op == "parameter" and parameter.arguments == str(place):
                    if _unchanged(inner, parameter):  # what comes out is read by others
                        return float(value.bytes) if user.root else self._read(computation, user)
                    return self._read(inner, parameter)
        return float(value.bytes)

    def _written(self, computation: Mapping[str, Instruction], i: Instruction) -> float:
        if i.op == "dynamic-update-slice":
            update = computation.get(i.operands[1])
            return float(update.bytes if update else i.bytes)
        if i.op == "bitcast" and i.operands[0] in computation:
            return self._written(computation, computation[i.operands[0]])
        if i.op == "tuple":
            return sum(self._written(computation, computation[o]) for o in i.operands)
        if i.op == "fusion" and "calls" in i.called:
            inner = self.computations[i.called["calls"][0]]
            return self._written(inner, _root(inner))
        return float(sum(shape.bytes for shape in i.shapes))

    def _moved(self, computation: Mapping[str, Instruction], i: Instruction) -> float:
        """Bytes of an instruction outside fusions."""
        if i.op == "copy-start":  # its type is (to, from, context)
            return float(sum(shape.bytes for shape in i.shapes[:2] if not shape.fast))
        if i.op == "slice-start":  # ((from), to, context): of `from` it reads as much as `to` has
            given, part = i.shapes[:2]
            return float(part.bytes * ((not given.fast) + (not part.fast)))
        if i.op in ("dynamic-slice", "slice", "gather"):
            return 2.0 * i.bytes
        if i.op in ("dynamic-update-slice", "scatter"):
            update = computation.get(i.operands[1 if i.op == "dynamic-update-slice" else -1])
            return 2.0 * (update.bytes if update else i.bytes)
        read = sum(computation[o].bytes for o in i.operands if o in computation)
        return float(i.bytes + (0 if i.op == "broadcast" else read))


def counter(text: str, devices: int = 1) -> Counter:
    """Read the text of a compiled module (`compiled.as_text()`)."""
    return Counter(*parse(text), devices)


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _unchanged(computation: Mapping[str, Instruction], parameter: Instruction) -> bool:
    """Whether a computation gives back this parameter under another shape."""
    value = _root(computation)
    while value.op == "bitcast" and value.operands[0] in computation:
        value = computation[value.operands[0]]
    return value is parameter


def _element(computation: Mapping[str, Instruction], name: str, place: int) -> str:
    value = computation.get(name)
    return value.operands[place] if value and value.op == "tuple" else ""


def _number(computation: Mapping[str, Instruction], name: str) -> int | None:
    value = computation.get(name)
    while value is not None and value.op in ("copy", "bitcast", "convert", "broadcast"):
        value = computation.get(value.operands[0])
    if value is not None and value.op == "constant" and re.fullmatch(r"-?\d+", value.arguments):
        return int(value.arguments)
    return None
