"""Several methods over several seeds: the table of means and deviations, and pictures of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_jax import hosts
from minillm_jax.reporting.formats import is_number
from minillm_jax.reporting.plots import colour_of
from minillm_jax.reporting.results import COLUMNS, DEVIATION, STDERR, label

# Model -> figure -> {"mean", "std", "values"}, the values by seed; an absent figure is left out.
Table = dict[str, dict[str, dict[str, Any]]]

SHOWN = (
    "tokens", "reverse_kl", "nll", "rouge_l", "length", "finished", "distinct_4",
    "greedy_repetition", "greedy_loops",
)  # fmt: skip
# Points of one seed: tokens read so far and the figure, at each validation of a method.
Curve = Sequence[tuple[float, float]]
CURVES = {"valid_reverse_kl": "Reverse KL", "valid_loss": "Loss of the given answers"}
DRAWN = ("reverse_kl", "nll", "rouge_l", "greedy_loops", "exposure_bias")
# What is measured only when asked for, of one or of several data sets.
_FURTHER = ("exposure_bias", "rouge_l_", "ece_", "accuracy_")


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one value); empty without values."""
    values = list(values)
    if not values:
        return {}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": values}


def columns(seeds: Iterable[Mapping[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """The figures of a table: `SHOWN`, and what else was measured of the figures [seed][model]."""
    keys = {key: None for seed in seeds for figures in seed.values() for key in figures}
    ends = (DEVIATION, STDERR)
    further = [k for k in keys if k.startswith(_FURTHER) and not k.endswith(ends)]
    return (*SHOWN, *sorted(further))


def tabulate(seeds: Sequence[Mapping[str, Mapping[str, Any]]], columns: Sequence[str]) -> Table:
    """The table of figures [seed][model][column]; a model may lack in some seeds."""
    models = dict.fromkeys(name for seed in seeds for name in seed)
    table: Table = {}
    for model in models:
        found = [seed[model] for seed in seeds if model in seed]
        rows = {c: spread(f[c] for f in found if f.get(c) is not None) for c in columns}
        table[model] = {c: row for c, row in rows.items() if row}
    return table


def as_text(table: Table, columns: Sequence[str]) -> str:
    """The table for a terminal and, as it stands, for Markdown."""
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model, row in table.items():
        cells = [_cell(c, row[c]) if c in row else "" for c in columns]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, value: Mapping[str, Any]) -> str:
    digits = 0 if column == "tokens" else 3
    mean, deviation = value["mean"], value["std"]
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def draw(path: Path, table: Table, columns: Sequence[str] = DRAWN) -> None:
    """Write a PNG: for each figure a bar per model, one standard deviation either way."""
    if not hosts.is_main():
        return
    from matplotlib.figure import Figure  # slow to import

    shown = [c for c in columns if any(c in row for row in table.values())]
    known = {column.key: column for column in COLUMNS}
    figure = Figure(figsize=(4.2 * max(len(shown), 1), 1.2 + 0.42 * len(table)), layout="tight")
    for place, key in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        rows = [(model, row[key]) for model, row in table.items() if key in row]
        means = [value["mean"] for _, value in rows]
        stds = [value["std"] for _, value in rows]
        colours = [colour_of(model) for model, _ in rows]
        axes.barh(range(len(rows)), means, color=colours)
        for row, (mean, std) in enumerate(zip(means, stds, strict=True)):
            if std is not None:
                axes.errorbar(mean, row, xerr=std, ecolor="#24292f", capsize=3)
        axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(rows)), [label(model) for model, _ in rows])
        axes.invert_yaxis()
        if not any(means):
            axes.set_xlim(0, 1)
        column = known[key]
        better = f", {column.better} is better" if column.better else ""
        axes.set_title(f"{column.label}{better}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def curve(rows: Iterable[Mapping[str, Any]], metric: str, before: float) -> Curve:
    """The validations in the rows of a stage whose start had read `before` tokens."""
    read, found = before, []
    for row in rows:
        read += row.get("tokens") or 0
        if is_number(row.get(metric)):
            found.append((read, row[metric]))
    return found


def draw_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> None:
    """Write a PNG: for each of `CURVES` a line per method, one deviation over its seeds as a band.

    The mean is over the n-th validations of all seeds, as far as the shortest goes. Without any
    nothing is written.

    Args:
        curves: by metric and method, one for each seed.
    """
    found = {name: {m: c for m, c in by.items() if any(c)} for name, by in curves.items()}
    shown = [name for name in CURVES if found.get(name)]
    if not shown or not hosts.is_main():
        return
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5.6 * len(shown), 4.2), layout="tight")
    for place, name in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        for method, seeds in found[name].items():
            line(axes, method, [seed for seed in seeds if seed], marker="o", ms=3)
        axes.set_xlabel("tokens read")
        _finish(axes, f"{CURVES[name]} on the validation prompts, nats per token")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def of_models(seeds: Iterable[Mapping[str, Mapping[str, Any]]], key: str) -> dict[str, list[Any]]:
    """By model, what its `figures.json` of each seed holds under `key`, where there is anything."""
    found: dict[str, list[Any]] = {}
    for models in seeds:
        for model, one in models.items():
            if value := one.get(key):
                found.setdefault(model, []).append(value)
    return found


def draw_exposure(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a PNG: ExAccErr by length, a line per method, one deviation over its seeds as a band.

    As far as the answers of all its seeds reach. Without any nothing is written.

    Args:
        curves: by method, `exposure.curve` for each seed.
    """
    if not curves or not hosts.is_main():
        return
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.4, 4.2), layout="tight")
    axes = figure.add_subplot(1, 1, 1)
    axes.axhline(0, color="#d8dee4", linewidth=1.5)
    for method, seeds in curves.items():
        line(axes, method, [list(enumerate(c["excess"][: c["reach"]], 1)) for c in seeds])
    axes.set_xlabel("length of the answer, tokens")
    _finish(axes, "Excess accumulated error, %, on the test prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def line(axes: Any, method: str, seeds: Sequence[Curve], **style: Any) -> None:
    """The mean of a method's curves, one deviation over its seeds as a band."""
    at, mean, deviation = over_seeds(seeds)
    pairs = list(zip(mean, deviation, strict=True))
    low, high = [m - d for m, d in pairs], [m + d for m, d in pairs]
    colour, text = colour_of(method), label(method).removeprefix("Student, ")
    axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(at, mean, color=colour, linewidth=1.8, label=text, **style)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", color="#d8dee4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def over_seeds(seeds: Sequence[Curve]) -> tuple[list[float], list[float], list[float]]:
    """Mean place, mean and deviation of the figure at every point that all seeds have."""
    tokens, mean, deviation = [], [], []
    for points in zip(*seeds, strict=False):
        tokens.append(statistics.fmean(read for read, _ in points))
        values = spread(value for _, value in points)
        mean.append(values["mean"])
        deviation.append(values["std"] or 0.0)
    return tokens, mean, deviation
