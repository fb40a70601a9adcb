"""`report.html` of a comparison: the page of a run, with means over the seeds for its figures."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minillm_jax.reporting import plots, report
from minillm_jax.reporting.comparison import CURVES, Curve, line, of_models, over_seeds, tabulate
from minillm_jax.reporting.results import DEVIATION, STDERR, label


def page(
    configs: Sequence[Mapping[str, Any]],
    seeds: Sequence[Mapping[str, Mapping[str, Any]]],
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """The page of a comparison as HTML text: means over the seeds where others have one figure.

    Args:
        configs: of each seed.
        seeds: by seed and model, what `figures.json` holds.
        curves: as for `draw_curves`.
        answers: by model, a row per prompt.
    """
    models = _means([{m: found["figures"] for m, found in models.items()} for models in seeds])
    numbers = [config.get("seed") for config in configs]
    return report.render(
        summary={"config": configs[0].get("name"), "seeds": numbers, "models": models},
        rows=(),
        config=configs[0],
        answers=_side_by_side(answers),
        measures=_measures(seeds),
        methods=_method_charts(curves),
    )


def _means(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """[seed][model][figure] as {model: figures}, with deviations where there are several seeds."""
    keys = dict.fromkeys(key for models in seeds for found in models.values() for key in found)
    own = [key for key in keys if not key.endswith(DEVIATION)]
    found: dict[str, dict[str, float]] = {}
    for model, row in tabulate(seeds, own).items():
        found[model] = {key: value["mean"] for key, value in row.items()}
        found[model] |= {
            key + DEVIATION: value["std"]
            for key, value in row.items()
            if value["std"] is not None and not key.endswith(STDERR) and key != "parameters"
        }
    return found


def _measures(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Exposure bias, calibration and lengths over the seeds, in the form that `evaluate` writes."""
    biases = of_models(seeds, "exposure_bias")
    found: dict[str, dict[str, Any]] = {"calibration": {}, "lengths": {}}
    for model, runs in of_models(seeds, "calibration").items():
        for data in dict.fromkeys(name for run in runs for name in run):
            parts = [run[data] for run in runs if data in run]
            ece = statistics.fmean(part["ece"] for part in parts)
            judged = {"ece": ece, "bins": _pooled(parts)}
            found["calibration"].setdefault(data, {})[model] = judged
    for model, runs in of_models(seeds, "lengths").items():
        for test in dict.fromkeys(name for run in runs for name in run):
            buckets = _means([run[test] for run in runs if test in run])
            found["lengths"].setdefault(test, {})[model] = buckets
    return found | {"exposure_bias": {m: _mean_curve(runs) for m, runs in biases.items()}}


def _mean_curve(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(seeds) == 1:
        return dict(seeds[0])
    _, mean, deviation = over_seeds(
        [list(enumerate(one["excess"][: one["reach"]], 1)) for one in seeds]
    )
    return {"excess": mean, "deviation": deviation, "reach": len(mean), "over": "seeds"}


def _pooled(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The bins of several reliability diagrams as those of all their rows."""
    bins: dict[float, list[Mapping[str, float]]] = {}
    for part in parts:
        for one in part["bins"]:
            bins.setdefault(one["low"], []).append(one)
    found = []
    for low, same in sorted(bins.items()):
        count = sum(one["count"] for one in same)
        keys = ("confidence", "accuracy")
        means = {key: sum(one[key] * one["count"] for one in same) / count for key in keys}
        found.append({"low": low, "count": count} | means)
    return found


def _side_by_side(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of one model each as rows with the answers of all to a prompt."""
    found = []
    for same in zip(*answers.values(), strict=False):
        row = dict(same[0])
        for key in ("answers", "samples"):
            row[key] = {model: text for one in same for model, text in (one.get(key) or {}).items()}
        found.append(row)
    return found


def _method_charts(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> list[plots.Chart]:
    charts = []
    for name, title in CURVES.items():
        methods = {m: [c for c in by if c] for m, by in (curves.get(name) or {}).items()}
        methods = {m: by for m, by in methods.items() if by}
        if not methods:
            continue
        with plots.style():
            figure, axes = plots.new_figure(height=2.9)
            figure.subplots_adjust(left=0.105, right=0.985, top=0.97, bottom=0.165)
            for method, by in methods.items():
                line(axes, method, by, marker="o", ms=4)
            axes.grid(axis="y", linewidth=1)
            axes.set_xlabel("tokens read")
            last = {m: over_seeds(by)[1][-1] for m, by in methods.items()}
            text = "; ".join(f"{label(m)} {value:.3f} at the end" for m, value in last.items())
            svg = plots.to_svg(figure, f"methods-{name}", f"{title}: {text}")
        legend = tuple((label(m), plots.css_colour(m), False) for m in methods)
        chart = plots.Chart(f"methods-{name}", title, "validation, nats per token", legend, svg)
        charts.append(chart)
    return charts
