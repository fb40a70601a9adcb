"""Other meshes, micro-batches and remat for one experiment on one machine, best first.

Every candidate is compiled, and that takes minutes for a large model. So a mesh begins with whole
batches and the least remat, and a program that does not fit there, and no other, gets what its
figures say may do: fewer rows at once, and where one row is too many, more remat. What a candidate
leaves as it was is compiled once.
"""

import copy
import sys
from collections import deque
from pathlib import Path
from typing import Any

from minillm_jax.planning.estimate import Figures, measure
from minillm_jax.planning.programs import Program, meshes, programs
from minillm_jax.planning.shapes import Shapes
from minillm_jax.planning.targets import BUSY, Target
from minillm_jax.planning.verdict import (
    SECTION_OF,
    Plan,
    changed,
    divides,
    flags,
    gathered,
    plan,
)
from minillm_jax.types import InputError

Changes = dict[str, dict[str, Any]]

REMAT = ("dots", "full")  # "none" takes more memory, and no less time (benchmarks/README.md)
_SIDE_BY_SIDE = 4  # meshes that are tried in turn until one fits, or has nothing left
_COLLECT = "collect"


def search(config: Any, workdir: Path, target: Target, most: int) -> list[tuple[Changes, Plan]]:
    """Compile up to `most` candidates and rank those that fit by time; those that do not, last."""
    made: dict[tuple, Figures] = {}
    found: list[tuple[Changes, Plan]] = []
    waiting = deque(beginnings(config, workdir, target))
    while waiting and len(found) < most:
        changes = waiting.popleft()
        print(f"{len(found) + 1} of up to {most}: {flags(changes)}", file=sys.stderr)
        now = changed(config, changes)
        try:
            one = plan(now, workdir, target, measured=_once(made, changes))
        except InputError as error:
            if str(error) == BUSY:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        found.append((changes, one))
        if not one.fits and (after := squeezed(now, changes, one)):
            waiting.insert(_SIDE_BY_SIDE - 1, after)
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].seconds))


def beginnings(config: Any, workdir: Path, target: Target) -> list[Changes]:
    """A candidate for every mesh that the batches and models allow.

    Those first that need least memory: models split over all devices by `fsdp`.
    """
    found: list[tuple[int, Changes]] = []
    for sizes in meshes(len(target.devices)):
        try:
            build = Shapes(changed(config, {"mesh": sizes}), workdir, target.devices)
            divides(build)
        except InputError:
            continue
        changes: Changes = {"mesh": sizes}
        for program in programs(build):
            if section := SECTION_OF.get(program.name):
                rows = config[section].batch_size // build.ways
                changes[section] = {"micro_batch": rows, "remat": REMAT[0]}
        found.append((sizes["tensor"] * sizes["data"], changes))
    return [changes for _, changes in sorted(found, key=lambda one: one[0])]


def squeezed(config: Any, changes: Changes, found: Plan) -> Changes | None:
    """The candidate after one that did not fit, on the same mesh; None where nothing is left."""
    after = copy.deepcopy(changes)
    memory = found.target.chip.memory
    for f in found.figures:
        if f.fits:
            continue
        fixed = sum(f.parts.values()) + f.held
        fixed += gathered(config, found, f) if f.name == _COLLECT else 0.0
        if fixed > memory:
            return None
        # What is not fixed grows with the rows that are read at once.
        share = (memory - fixed) / max(f.peak - fixed, 1.0)
        ways = found.mesh["data"] * found.mesh["fsdp"]
        if f.name == _COLLECT:
            rows = config.distill.collect_batch or config.distill.rollouts
            fewer = [n for n in _divisors(rows) if n < rows and n % ways == 0]
            if not fewer:
                return None
            batch = next((n for n in fewer if n <= share * rows), fewer[-1])
            after.setdefault("distill", {})["collect_batch"] = batch
            continue
        section = after[SECTION_OF[f.name]]
        rows, remat = section["micro_batch"], REMAT.index(section["remat"])
        if fewer := [n for n in _divisors(rows) if n < rows and n <= share * rows]:
            section["micro_batch"] = fewer[0]
        elif remat + 1 < len(REMAT):
            section["remat"] = REMAT[remat + 1]
        elif rows > 1:  # there is no more remat, and a guess may be wrong
            section["micro_batch"] = next(n for n in _divisors(rows) if n < rows)
        else:
            return None
    return after


def _divisors(count: int) -> list[int]:
    """The largest first."""
    return [n for n in range(count, 0, -1) if count % n == 0]


def _once(made: dict[tuple, Figures], changes: Changes):
    """`measure`, but once for the same program under the same settings that it depends on."""

    def measured(program: Program, target: Target) -> Figures:
        distill = changes.get("distill", {})
        if program.name == _COLLECT:
            settings: Any = distill.get("collect_batch")
        else:
            section = changes[SECTION_OF[program.name]]
            settings = section["micro_batch"], section["remat"]
        key = (program.name, tuple(changes["mesh"].items()), settings)
        if key not in made:
            made[key] = measure(program, target)
        return made[key]

    return measured
