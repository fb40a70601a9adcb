"""Other meshes, micro-batches and remat for one experiment on one machine, best first.

Every candidate is compiled, those that promise most first: a compilation takes half a minute for
a large model, so `most` bounds their number. What a candidate does not change is compiled once.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm_jax.planning.estimate import Figures, measure
from minillm_jax.planning.programs import Program, meshes
from minillm_jax.planning.shapes import Shapes
from minillm_jax.planning.targets import Target
from minillm_jax.planning.verdict import Plan, changed, divides, flags, plan
from minillm_jax.types import InputError

Changes = dict[str, dict[str, Any]]

REMAT = ("none", "dots", "full")


def candidates(config: Any, workdir: Path, target: Target) -> list[Changes]:
    """Settings that the batches and models allow, those first that need least and move least.

    First the largest micro-batch without remat of every mesh, then smaller ones, then more remat.
    """
    found: list[tuple[tuple, Changes]] = []
    for sizes in meshes(len(target.devices)):
        try:
            build = Shapes(changed(config, {"mesh": sizes}), workdir, target.devices)
            divides(build)
        except InputError:
            continue
        for micro, remat in _ways(config, build):
            section = {"micro_batch": micro, "remat": remat}
            cost = (REMAT.index(remat), -micro, sizes["tensor"], sizes["data"])
            found.append((cost, {"mesh": sizes, "distill": section}))
    return [changes for _, changes in sorted(found, key=lambda one: one[0])]


def _ways(config: Any, build: Shapes) -> Iterator[tuple[int, str]]:
    rows = config.distill.batch_size // build.ways
    for remat in REMAT:
        micro = rows
        while micro >= 1:
            yield micro, remat
            micro //= 4


def search(config: Any, workdir: Path, target: Target, most: int) -> list[tuple[Changes, Plan]]:
    """Compile up to `most` candidates and rank those that fit by time; those that do not, last."""
    made: dict[tuple, Figures] = {}

    def measured(key: tuple):
        def once(program: Program, target: Target) -> Figures:
            # A collection does not know how an update is cut.
            mine = (program.name, key if program.name != "collect" else key[:1])
            if mine not in made:
                made[mine] = measure(program, target)
            return made[mine]

        return once

    everything = candidates(config, workdir, target)
    found = []
    for place, changes in enumerate(_spread(everything, most), 1):
        print(f"{place}/{min(most, len(everything))}: {flags(changes)}", file=sys.stderr)
        key = (tuple(changes["mesh"].items()), tuple(changes["distill"].items()))
        one = plan(
            changed(config, changes),
            workdir,
            target,
            only=("collect", "distill update", "student_sft update"),
            measured=measured(key),
        )
        found.append((changes, one))
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].seconds))


def _spread(everything: list[Changes], most: int) -> list[Changes]:
    """At most so many, one of every mesh before a second one of any."""
    rounds: dict[tuple, int] = {}
    order = []
    for changes in everything:
        mesh = tuple(changes["mesh"].items())
        rounds[mesh] = rounds.get(mesh, 0) + 1
        order.append((rounds[mesh], len(order), changes))
    return [changes for *_, changes in sorted(order, key=lambda one: one[:2])][:most]
