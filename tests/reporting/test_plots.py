import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from minillm_jax.methods.registry import METHODS
from minillm_jax.reporting import plots
from minillm_jax.reporting.plots import Bar
from minillm_jax.reporting.writers import read_rows


def test_every_panel_of_a_whole_run(run):
    charts = plots.training_charts(read_rows(run / "metrics.jsonl"))
    names = [chart.name for chart in charts]
    assert names == [
        "reverse-kl",
        "distill-losses",
        "distill-loss",
        "sft-loss",
        "length",
        "ess",
        "entropy",
        "grad-norm",
    ]
    assert [entry[0] for entry in charts[1].legend] == ["policy", "single step"]
    assert [entry[2] for entry in charts[0].legend] == [False, True]
    for chart in charts:
        svg = ElementTree.fromstring(chart.svg)
        assert svg.tag == "svg" and svg.get("aria-label", "").startswith(chart.title)
        assert "http" not in chart.svg


def test_ids_of_two_charts_on_one_page_differ(run):
    charts = plots.training_charts(read_rows(run / "metrics.jsonl"))
    ids = [i for chart in charts for i in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids)) > 0
    used = {
        i
        for chart in charts
        for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', chart.svg)
        for i in pair
        if i
    }
    assert used and used <= set(ids)


def test_one_row_nulls_and_strangers_are_drawn():
    rows = [
        {"stage": "distill", "step": 1, "seconds": 1.0, "reverse_kl": 0.7, "loss": None},
        {"stage": "distill", "step": 2, "grad_norm": None, "ess": "high"},
        {"stage": "student_sft", "step": 1, "grad_norm": 0.0},  # a log axis has no zero
        {"stage": 3},
        {},
    ]
    assert [c.name for c in plots.training_charts(rows)] == ["reverse-kl", "grad-norm"]
    assert plots.training_charts([]) == []


def test_a_long_run_does_not_grow_the_page():
    rows = [{"stage": "distill", "step": i, "entropy": float(i % 7)} for i in range(20_000)]
    (chart,) = plots.training_charts(rows)
    assert len(chart.svg) < 60_000


def test_colours_are_variables_of_the_page(run):
    (chart, *_) = plots.training_charts(read_rows(run / "metrics.jsonl"))
    assert "var(--minillm, #d55e00)" in chart.svg and "var(--ink" in chart.svg
    assert not re.search(r"(?<!, )#d55e00", chart.svg)
    assert plots.css_colour("sft") == "var(--sft, #0072b2)"
    assert plots.css_colour("gkd") == plots.colour_of("gkd")  # a plain one


def test_every_method_has_a_colour_that_no_other_is_near():
    names = ["teacher", "start", *METHODS, "one more", "and another"]
    colours = {name: to_rgb(plots.colour_of(name)) for name in names}
    for one, other in itertools.combinations(names, 2):
        apart = np.linalg.norm(np.subtract(colours[one], colours[other]))
        assert apart > 0.13, (one, other)


def test_bars_with_errors():
    bars = [
        Bar("sft", "SFT <1>", 0.7, 0.02, "0.700"),
        Bar("minillm", "MiniLLM", 0.5, None, "0.500"),
    ]
    chart = plots.result_chart("kl", "Reverse KL", "nats", bars)
    texts = [t.text for t in ElementTree.fromstring(chart.svg).iter("text")]
    assert {"SFT <1>", "MiniLLM", "0.700", "0.500"} <= set(texts)


@pytest.mark.parametrize("value", [0.0, -1.5, 1e6])
def test_a_single_bar_of_any_size(value):
    chart = plots.result_chart("x", "x", "x", [Bar("sft", "SFT", value, None, "here")])
    assert ">here<" in chart.svg
