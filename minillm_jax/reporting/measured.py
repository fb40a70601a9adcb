"""Charts of the evaluation: by length of the reference, exposure bias, reliability.

Each from the JSON that `evaluate` writes; a chart without a number to show is None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm_jax.reporting import results
from minillm_jax.reporting.formats import is_number
from minillm_jax.reporting.plots import (
    CARD,
    INK,
    LINE,
    Chart,
    colour_of,
    css_colour,
    drawable,
    new_figure,
    style,
    to_svg,
)

Models = Mapping[str, Any]


def length_chart(test: str, models: Models) -> Chart | None:
    """Rouge-L by the length of the reference, a group of bars per bucket."""
    buckets = list(dict.fromkeys(b for m in models.values() for b in m))
    buckets.sort(key=lambda bucket: int(bucket.partition("-")[0]))
    shown = [
        m for m in results.ordered(models) if any(_score(models[m], b) is not None for b in buckets)
    ]
    if len(buckets) < 2 or not shown:
        return None
    counts = {b: next(m[b]["count"] for m in models.values() if b in m) for b in buckets}
    with style():
        figure, axes = new_figure(height=2.9)
        figure.subplots_adjust(left=0.105, right=0.985, top=0.97, bottom=0.165)
        width = 0.8 / len(shown)
        for place, model in enumerate(shown):
            at = [i + (place - (len(shown) - 1) / 2) * width for i in range(len(buckets))]
            scores = [100 * (_score(models[model], b) or 0.0) for b in buckets]
            errors = [100 * (_score(models[model], b, "_deviation") or 0.0) for b in buckets]
            axes.bar(at, scores, width=0.92 * width, color=colour_of(model))
            if any(errors):
                axes.errorbar(at, scores, yerr=errors, fmt="none", ecolor=INK, capsize=2, lw=1.2)
        ticks = [f"{_range(b)} words\n{counts[b]:g} prompts" for b in buckets]
        axes.set_xticks(range(len(buckets)), ticks)
        axes.grid(axis="y", linewidth=1)
        name = f"lengths-{test}"
        title = "By length of the reference" + ("" if test == "test" else f", {test}")
        text = "; ".join(
            f"{results.label(m)} "
            + ", ".join(f"{_range(b)}: {100 * (_score(models[m], b) or 0):.1f}" for b in buckets)
            for m in shown
        )
        svg = to_svg(figure, name, f"{title}, Rouge-L: {text}")
    return Chart(name, title, "Rouge-L, F1 × 100", _legend(shown), svg)


def exposure_chart(models: Models) -> Chart | None:
    """ExAccErr as far as answers reach, with its deviation over prompts, or `over`, as a band."""
    curves = {m: _curve(models[m]) for m in results.ordered(models)}
    curves = {m: points for m, points in curves.items() if points}
    if not curves:
        return None
    with style():
        figure, axes = new_figure(height=2.9)
        figure.subplots_adjust(left=0.125, right=0.985, top=0.97, bottom=0.165)
        axes.axhline(0, color=LINE, linewidth=1.5)
        for model, points in curves.items():
            length, excess, low, high = zip(*points, strict=True)
            axes.fill_between(length, low, high, color=colour_of(model), alpha=0.18, linewidth=0)
            axes.plot(length, excess, color=colour_of(model), linewidth=2.2)
        axes.grid(axis="y", linewidth=1)
        axes.margins(x=0.015)
        axes.set_xlabel("length of the answer, tokens")
        text = "; ".join(
            f"{results.label(m)} {points[-1][1]:.1f} % at {points[-1][0]} tokens"
            for m, points in curves.items()
        )
        svg = to_svg(figure, "exposure-bias", f"Excess accumulated error in percent: {text}")
    over = next((models[m]["over"] for m in curves if "over" in models[m]), "prompts")
    unit = f"ExAccErr(l) in %, 0: no exposure bias; band: one deviation over {over}"
    return Chart("exposure-bias", "Exposure bias", unit, _legend(list(curves)), svg)


def reliability_chart(data: str, models: Models) -> Chart | None:
    """Accuracy against confidence; on the diagonal a model is as right as it says."""
    shown = [m for m in results.ordered(models) if models[m].get("bins")]
    if not shown:
        return None
    with style():
        figure, axes = new_figure(height=3.5)
        figure.subplots_adjust(left=0.105, right=0.985, top=0.98, bottom=0.14)
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.5, linestyle=(0, (4, 3)))
        most = max(b["count"] for m in shown for b in models[m]["bins"]) or 1
        for model in shown:
            bins, colour = models[model]["bins"], colour_of(model)
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, color=colour, linewidth=1.6)
            # The area of a point is the share of the rows that are in its bin.
            sizes = [25 + 320 * b["count"] / most for b in bins]
            axes.scatter(x, y, s=sizes, color=colour, edgecolors=CARD, linewidths=1.2, zorder=4)
        axes.set_xlim(0.45, 1.02)
        axes.set_ylim(-0.03, 1.05)
        axes.grid(linewidth=1)
        axes.set_xlabel("confidence")
        name = f"reliability-{data}"
        text = ", ".join(f"{results.label(m)} {_ece(models[m])}" for m in shown)
        svg = to_svg(figure, name, f"Accuracy by confidence on {drawable(data)}: ECE {text}")
    legend = tuple(
        (f"{results.label(m)}, ECE {_ece(models[m])}", css_colour(m), True) for m in shown
    )
    return Chart(name, f"Reliability, {data}", "accuracy by confidence", legend, svg)


def _ece(found: Mapping[str, Any]) -> str:
    return f"{found['ece']:.3f}" if is_number(found.get("ece")) else "–"


def _score(buckets: Mapping[str, Any], bucket: str, end: str = "") -> float | None:
    value = (buckets.get(bucket) or {}).get(f"rouge_l{end}")
    return value if is_number(value) else None


def _range(bucket: str) -> str:
    low, _, high = bucket.partition("-")
    return f"{low}–{high}" if high else f"{low} and more"


def _curve(found: Mapping[str, Any]) -> list[tuple[int, float, float, float]]:
    points = []
    pairs = zip(found.get("excess") or [], found.get("deviation") or [], strict=False)
    for length, (excess, deviation) in enumerate(pairs, 1):
        if length > found.get("reach", 0) or not is_number(excess):
            break
        spread = deviation if is_number(deviation) else 0.0
        points.append((length, excess, excess - spread, excess + spread))
    return points


def _legend(models: Sequence[str]) -> tuple[tuple[str, str, bool], ...]:
    return tuple((results.label(m), css_colour(m), False) for m in models)
