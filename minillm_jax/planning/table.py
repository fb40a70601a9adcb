"""A plan in words, as a table and as JSON."""

import math
from typing import Any, TextIO

from minillm_jax.planning.chips import GIB
from minillm_jax.planning.estimate import Figures
from minillm_jax.planning.verdict import Plan, flags


def as_json(plan: Plan, cures: list[str]) -> dict[str, Any]:
    """Everything that was found; bytes and operations are of one device, once."""
    chip, target = plan.target.chip, plan.target
    return {
        "topology": target.name,
        "chip": chip.name,
        "devices": len(target.devices),
        "memory_bytes": chip.memory,
        "mesh": plan.mesh,
        "settings": plan.settings,
        "fits": plan.fits,
        "programs": [
            {
                "name": f.name,
                "fits": f.fits,
                "bytes": {**f.parts, "held": f.held, "cache": f.cache, "activations": f.work_space},
                "peak_bytes": f.peak,
                "flops": f.flops,
                "needed_flops": f.needed,
                "collective_bytes": f.collectives,
                "compute_seconds": f.compute_seconds,
                "network_seconds": f.network_seconds,
                "times": f.times,
                "seconds": f.seconds,
                "seconds_all_overlapped": f.best,
                "mfu": f.utilisation(target),
                "extrapolated": f.extrapolated,
                "assumed_loops": list(f.assumed),
            }
            for f in plan.figures
        ],
        "updates": plan.updates,
        "seconds": plan.seconds,
        "chip_hours": plan.chip_hours,
        "notes": list(plan.notes),
        "cures": cures,
    }


def show(plan: Plan, cures: list[str], title: str, stream: TextIO) -> None:
    """Print a plan: a column per program, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    chips = f"{len(plan.target.devices)} x {plan.target.chip.name}"
    console.print(Text(f"{title} on {plan.target.name} ({chips}), mesh {axes}", style="bold"))
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("of one device")
    for f in plan.figures:
        drawn.add_column(f.name, justify="right")
    for label, cells in rows(plan):
        drawn.add_row(Text(label), *map(Text, cells))
    console.print(drawn)
    for note in plan.notes:
        console.print(Text(f"* {note}"))
    for line in verdict(plan, cures):
        console.print(Text(line, style="bold green" if plan.fits else "bold red"))


def rows(plan: Plan) -> list[tuple[str, list[str]]]:
    """The lines of the table: label, and a cell per program."""

    def line(label: str, cell) -> tuple[str, list[str]]:
        return label, [cell(f) for f in plan.figures]

    def part(name: str):
        return lambda f: gib(f.parts.get(name, 0.0))

    memory = gib(plan.target.chip.memory)
    return [
        line("parameters, GiB", part("parameters")),
        line("teacher, GiB", part("teacher")),
        line("optimizer, GiB", part("optimizer")),
        line("batch, GiB", part("batch")),
        line("held meanwhile, GiB", lambda f: gib(f.held)),
        line("cache, GiB", lambda f: gib(f.cache)),
        line("activations and code, GiB", lambda f: gib(f.work_space)),
        line(f"peak of {memory} GiB", _peak),
        line("matrix products, TFLOP", lambda f: number(f.flops / 1e12)),
        line("collectives, GB", _collectives),
        line("arithmetic and memory, s", lambda f: number(f.compute_seconds)),
        line("collectives, s", lambda f: number(f.network_seconds)),
        line("times per rollout or update", lambda f: str(f.times)),
        line("seconds, no overlap", lambda f: number(f.seconds)),
        line("seconds, all overlapped", lambda f: number(f.best)),
        line("MFU, no overlap", lambda f: percent(f.utilisation(plan.target))),
    ]


def _peak(f: Figures) -> str:
    least = "over " if math.isnan(f.work_space) else ""
    return f"{least}{gib(f.peak)}" + ("" if f.fits else " does not fit")


def _collectives(f: Figures) -> str:
    if math.isnan(f.flops):
        return "-"
    return "\n".join(f"{kind} {number(size / 1e9)}" for kind, size in f.collectives.items()) or "0"


def verdict(plan: Plan, cures: list[str]) -> list[str]:
    """The last lines: fits or not, what it costs, and what would help."""
    if not plan.fits:
        return ["does not fit", *cures]
    hours = plan.seconds / 3600
    return [
        f"fits: {plan.updates} updates take at least {number(hours)} h, "
        f"{number(plan.chip_hours)} chip-hours, with no overlap of collectives"
    ]


def gib(size: float) -> str:
    """Bytes in GiB."""
    return "-" if math.isnan(size) else f"{size / GIB:.2f}"


def number(value: float) -> str:
    """Three significant digits."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def show_ranking(ranked: list[tuple[dict[str, dict[str, Any]], Plan]], stream: TextIO) -> None:
    """Print the candidates of a search, the fastest that fits first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, width=None if stream.isatty() else 140, highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("settings", "peak GiB", "s per update", "s per rollout", "chip-hours"):
        drawn.add_column(name, justify="left" if name == "settings" else "right")
    for changes, plan in ranked:
        seconds = {f.name: number(f.seconds) for f in plan.figures}
        peak = max(f.peak for f in plan.figures)
        cells = [
            flags(changes),
            gib(peak) + ("" if plan.fits else " does not fit"),
            seconds.get("distill update", "-"),
            seconds.get("collect", "-"),
            number(plan.chip_hours),
        ]
        drawn.add_row(*map(Text, cells))
    console.print(drawn)
