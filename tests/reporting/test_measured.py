"""Charts and tables of the evaluation, colours of tokens, and the page with all of them."""

import json
from xml.etree import ElementTree

import pytest

from minillm_jax.reporting import measured, plots, report, samples, tables
from minillm_jax.reporting.samples import shade
from tests.reporting.conftest import write_measures


@pytest.fixture
def full(run):
    """A run in which everything was measured."""
    return write_measures(run)


def read(run, name):
    return json.loads((run / "evaluate" / f"{name}.json").read_text())


def texts(chart):
    return [t.text for t in ElementTree.fromstring(chart.svg).iter("text")]


def test_bars_by_length_name_bucket_and_count(full):
    models = read(full, "lengths")["test"]
    for buckets in models.values():  # as a mean over seeds is
        for one in buckets.values():
            one["count"] = float(one["count"])
    chart = measured.length_chart("test", models)
    assert chart and {"0–5 words", "11 and more words", "12 prompts"} <= set(texts(chart))
    assert [label for label, _, _ in chart.legend] == [
        "Teacher", "Student, start", "Student, SFT", "Student, MiniLLM",
    ]  # fmt: skip
    one = {m: {"11-": found["11-"]} for m, found in models.items()}
    assert measured.length_chart("test", one) is None  # there is nothing to compare


def test_a_curve_ends_where_few_answers_run(full):
    curves = read(full, "exposure_bias")
    chart = measured.exposure_chart(curves)
    assert chart and "% at 60 tokens" in chart.svg  # of 64: then fewer than 5 % run
    curves["sft"]["excess"][3] = None
    chart = measured.exposure_chart(curves)
    assert chart and "% at 3 tokens" in chart.svg
    assert measured.exposure_chart({}) is None


def test_a_reliability_diagram_has_its_error_in_the_legend(full):
    chart = measured.reliability_chart("sst2", read(full, "calibration")["sst2"])
    assert chart and chart.legend[0][0] == "Teacher, ECE 0.040" and "ECE" in chart.svg
    assert measured.reliability_chart("sst2", {"sft": {"bins": []}}) is None


def test_the_table_of_test_sets(full):
    tests = read(full, "tests")
    table = tables.test_sets(tests)
    assert table and table.columns == [
        ("held out", "Rouge-L, 64 prompts"), ("", "exact match"),
        ("held out, n-gram ban", "Rouge-L, 64 prompts"), ("", "exact match"),
        ("vicuna", "Rouge-L, 80 prompts"), ("", "exact match"),
    ]  # fmt: skip
    model, label, cells = table.rows[-1]
    assert (model, label, cells[:2]) == (
        "minillm",
        "Student, MiniLLM",
        ["26.7 ± 0.4", "1.6 ± 0.1 %"],
    )
    del tests["vicuna"]
    for found in tests["test"].values():
        del found["ban"]
    assert tables.test_sets(tests) is None


def test_the_table_of_the_judge():
    sft = {"judged": 9, "ratio": 0.512, "ratio_deviation": 0.013}
    sft |= {"wins": 0.25, "ties": 0.5, "losses": 0.25}
    found = {"judge": "gpt", "mode": "reference", "baseline": ""}
    found |= {"tests": {"test": {"sft": sft, "start": {"judged": 0}}}}
    table = tables.judged(found)
    assert table and table.rows[1][2] == ["51.2 ± 1.3 %", "25 % · 50 % · 25 %"]
    assert table.rows[0][2] == ["–", "–"] and "both orders" in table.note
    alone = {"mode": "single", "tests": {"test": {"sft": {"judged": 9, "score": 7.25}}}}
    table = tables.judged(alone)
    assert table and table.rows[0][2] == ["7.2"]
    assert tables.judged({}) is None


NAN, LOW = float("nan"), float("-inf")


@pytest.mark.parametrize(
    ("ratio", "colour"),
    [(0.0, ""), (0.3, ""), (-0.4, "q1"), (0.7, "p2"), (-1.5, "q3"), (9, "p4"), (LOW, "q4")]
    + [(None, ""), (NAN, "")],
)
def test_a_token_is_coloured_by_how_much_more_likely_it_is_to_one_model(ratio, colour):
    assert shade(ratio) == colour


def test_tokens_of_an_answer():
    found = samples.tokens({"pieces": ["a", " b", ""], "log_ratio": [0.1, -3.0, 1.0]})
    assert found == [("a", "", "+0.10"), (" b", "q4", "-3.00"), (samples.END, "p2", "+1.00")]
    assert samples.tokens({"pieces": ["a"]}) == [("a", "", "")]
    assert samples.tokens(None) == []


def test_the_page_with_everything(full):
    file = report.write_report(full)
    page = file.read_text()
    for part in (
        "Test sets", "Exposure bias", "Reliability, sst2", "By length of the reference",
        '<span class="q4" title="-3.10">', "Greedy answers", "± one deviation over seeds",
        "ECE, sst2", "score ratio, 64 answers", "26.7 ± 0.4",
    ):  # fmt: skip
        assert part in page
    assert "<script" not in page and "&lt;script&gt;" in page
    plots_there = sorted((full / "evaluate" / "plots").iterdir())
    assert [p.name for p in plots_there] == [
        "exposure-bias.svg", "lengths-test.svg", "reliability-sst2.svg",
    ]  # fmt: skip
    for file in plots_there:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_chart_as_a_file_names_its_kind(full):
    chart = measured.exposure_chart(read(full, "exposure_bias"))
    assert chart and plots.as_file(chart).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
