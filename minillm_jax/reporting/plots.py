"""Charts as inline SVG: training curves and held-out results.

Matplotlib draws, and is imported only then. Titles and legends are left to the page, so that they
take its font and wrap on a phone. Colours of a run are those of Okabe & Ito (2008), which
colour-blind readers tell apart. They are written as CSS variables (`--minillm`, `--ink`, `--line`,
`--card`) with the light value as fallback, so that a page can give them dark values. Methods that
only a comparison puts side by side have colours that can be read on either page.
"""

import colorsys
import html
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm_jax.reporting.formats import is_number, significant
from minillm_jax.reporting.metrics import smooth
from minillm_jax.reporting.panels import PANELS, Panel, Series

Rows = Sequence[Mapping[str, Any]]

MODEL_COLOURS = {
    "teacher": "#6e7781",
    "start": "#cc79a7",
    "sft": "#0072b2",
    "minillm": "#d55e00",
}
_OTHER_COLOURS = {"other1": "#009e73", "other2": "#b58900"}
_METHOD_COLOURS = {
    "kd": "#009e73",
    "seqkd": "#b58900",
    "seqkd_kd": "#8c6d31",
    "gkd": "#7b4fc9",
    "jsd": "#b08fe8",
    "opd": "#00a5c8",
    "skew_kl": "#7cb342",
    "skew_reverse_kl": "#2e7d32",
    "distillm": "#c2185b",
    "distillm_srkl": "#f0629a",
    "tvd": "#795548",
    "akl": "#3f51b5",
    "taid": "#dcc000",
    "minillm_no_single_step": "#ff9e4a",
    "minillm_no_length_norm": "#983a00",
    "minillm_no_mixing": "#e53935",
    "minillm_no_corpus": "#c9a48c",
}
INK, LINE, CARD = "#24292f", "#d8dee4", "#fefefe"
_VARIABLES = {
    **{colour: name for name, colour in (MODEL_COLOURS | _OTHER_COLOURS).items()},
    INK: "ink",
    LINE: "line",
    CARD: "card",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,
    "font.size": 13,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "axes.axisbelow": True,
}
_MOST_POINTS = 500  # of one line; beyond that only the file grows


@dataclass(frozen=True)
class Chart:
    """A drawn chart: text for its caption, the legend as (label, CSS colour, points), the SVG."""

    name: str
    title: str
    unit: str
    legend: tuple[tuple[str, str, bool], ...]
    svg: str


@dataclass(frozen=True)
class Bar:
    """One bar of a held-out figure; `text` is the value as it is printed."""

    model: str
    label: str
    value: float
    stderr: float | None
    text: str


def css_colour(name: str) -> str:
    """The CSS value of a model's or series' colour."""
    colour = colour_of(name)
    return f"var(--{_VARIABLES[colour]}, {colour})" if colour in _VARIABLES else colour


def training_charts(rows: Rows) -> list[Chart]:
    """The panels of `PANELS` that have at least one number in the rows of `metrics.jsonl`."""
    charts = []
    for panel in PANELS:
        drawn = [(s, *_points(rows, s)) for s in panel.series]
        drawn = [(s, steps, values) for s, steps, values in drawn if len(steps)]
        if drawn:
            charts.append(_training_chart(panel, drawn))
    return charts


def result_chart(name: str, title: str, unit: str, bars: Sequence[Bar]) -> Chart:
    """Horizontal bars of one held-out figure, with one standard error either way."""
    with style():
        figure, axes = new_figure(height=0.3 + 0.4 * len(bars))
        figure.subplots_adjust(left=0.275, right=0.995, top=0.99, bottom=0.02)
        for place, bar in enumerate(bars):
            axes.barh(place, bar.value, height=0.62, color=colour_of(bar.model))
            if bar.stderr:
                axes.errorbar(bar.value, place, xerr=bar.stderr, color=INK, capsize=3, lw=1.3)
            axes.annotate(
                bar.text,
                (bar.value + (bar.stderr or 0.0), place),
                xytext=(7, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        axes.set_yticks(range(len(bars)), [drawable(bar.label) for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.axvline(0, color=LINE, linewidth=1.5)
        # Room to the right of the longest bar for its figure.
        axes.set_xlim(
            min(0.0, *(bar.value for bar in bars), 0.0),
            1.32 * max(*(bar.value for bar in bars), 1e-9, 1e-9),
        )
        text = ", ".join(f"{bar.label} {bar.text}" for bar in bars)
        return Chart(name, title, unit, (), to_svg(figure, name, f"{title}, {unit}: {text}"))


def as_file(chart: Chart) -> str:
    """The SVG of a chart as a file of its own, on a white page and without a legend."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="background: #ffffff" '
    return chart.svg.replace("<svg ", head, 1) + "\n"


def colour_of(name: str) -> str:
    """The light colour of a model or series: its own, also of one that is not known here."""
    known = MODEL_COLOURS | _OTHER_COLOURS | _METHOD_COLOURS
    if name in known:
        return known[name]
    hue = zlib.crc32(name.encode("utf-8", "backslashreplace")) / 2**32
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.47, 0.6))
    return f"#{red:02x}{green:02x}{blue:02x}"


def drawable(text: str) -> str:
    """Text that Matplotlib can draw."""
    # It raises on half a surrogate pair and warns of a glyph that its font lacks.
    return text.encode("ascii", "replace").decode()


def _points(rows: Rows, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric of one stage, in the order of the steps."""
    found = [
        (row["step"], row[series.metric])
        for row in rows
        if row.get("stage") == series.stage
        and is_number(row.get("step"))
        and is_number(row.get(series.metric))
    ]
    steps, values = np.array(sorted(found), np.float64).reshape(-1, 2).T
    return steps, values


def _training_chart(panel: Panel, drawn: Sequence[tuple[Series, np.ndarray, np.ndarray]]) -> Chart:
    from matplotlib import ticker

    with style():
        figure, axes = new_figure(height=2.9)
        figure.subplots_adjust(left=0.105, right=0.985, top=0.97, bottom=0.165)
        if panel.log and all((values > 0).all() for _, _, values in drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        for series, steps, values in drawn:
            _draw(axes, series, steps, values)
        if panel.limits:
            axes.set_ylim(*panel.limits)
        axes.grid(axis="y", linewidth=1)
        axes.margins(x=0.015)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlabel("step")
        legend = tuple((s.label, css_colour(s.colour), s.points) for s, _, _ in drawn)
        alternative = "; ".join(
            f"{s.label} from {significant(values[0])} to {significant(values[-1])}"
            for s, _, values in drawn
        )
        svg = to_svg(figure, panel.name, f"{panel.title}, {panel.unit}: {alternative}")
        return Chart(panel.name, panel.title, panel.unit, legend, svg)


def _draw(axes: Any, series: Series, steps: np.ndarray, values: np.ndarray) -> None:
    colour = colour_of(series.colour)
    if series.points or len(steps) == 1:
        axes.plot(steps, values, color=colour, linewidth=1, linestyle=(0, (2, 3)))
        axes.scatter(steps, values, s=46, color=colour, edgecolors=CARD, linewidths=1.5, zorder=4)
        return
    if len(steps) < 12:
        axes.plot(steps, values, color=colour, linewidth=2.2)
        return
    average = smooth(values, max(5, len(values) // 12))
    every = max(1, -(-len(steps) // _MOST_POINTS))
    axes.plot(steps[::every], values[::every], color=colour, linewidth=1, alpha=0.3)
    axes.plot(steps[::every], average[::every], color=colour, linewidth=2.2)


def style() -> Any:
    """The look of all charts, as a context."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(height: float) -> tuple[Any, Any]:
    """A figure of that many inches in height and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # No pyplot: it keeps figures alive and chooses a backend for the whole process.
    figure = Figure(figsize=(5.8, height), facecolor="none")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def to_svg(figure: Any, name: str, alternative: str) -> str:
    """The drawn figure as an `<svg>` element that can stand beside others on a page."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Ids are per page, not per figure.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    _, view_box, rest = re.split(r'viewBox="([^"]+)"[^>]*>', svg, maxsplit=1)
    return (
        f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(alternative)}">'
        + rest.strip().replace("xlink:href", "href")
    )
