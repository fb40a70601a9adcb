import io
import json
import math

import pytest

from minillm_jax.reporting.progress import Progress, live_line, print_table


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def _run(stream, steps=40, seconds=2.0, **options):
    clock = Clock()
    with Progress(
        "distill", steps, headline="reverse_kl", stream=stream, clock=clock, **options
    ) as bar:
        for step in range(bar._step + 1, steps + 1):
            clock.now += seconds
            bar.update(step, tokens=512, metrics={"reverse_kl": 0.5})


def test_live_line():
    line = live_line(
        "distill", 5, 40, headline=("reverse_kl", 0.5312), tokens_per_second=1234, seconds_left=80
    )
    assert line.split("  ")[0] == "distill"
    assert line.endswith(" 5/40  reverse KL 0.531  1.23 k tokens/s  1 min 20 s left")
    assert live_line("sft", 1, 9, headline=("loss", math.nan)).split() == ["sft", "1/9"]


def test_off_a_terminal_lines_are_few_and_the_last_is_there():
    stream = io.StringIO()
    _run(stream, interval=10)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert [line.split()[1] for line in lines] == [f"{s}/40" for s in (1, *range(6, 40, 5), 40)]
    assert lines[1].endswith("6/40  reverse KL 0.500  256 tokens/s  1 min 08 s left")
    assert "left" not in lines[-1]


def test_a_stage_cut_short_shows_where_it_stopped():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("sft", 9, stream=stream, interval=1e9) as bar:
        bar.update(1)
        bar.update(2)
        raise KeyError
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "2/9"]


def test_a_resumed_stage_does_not_count_what_was_done_before():
    stream = io.StringIO()
    _run(stream, start=30, interval=0)
    first, *others = stream.getvalue().splitlines()
    # The first interval holds the compilation: nothing to tell the rest by.
    assert first.endswith("31/40  reverse KL 0.500  256 tokens/s")
    assert others[0].endswith("16 s left")
    assert len(others) == 9  # none of them twice


def test_headline_is_a_mean_and_survives_steps_without_it():
    stream = io.StringIO()
    with Progress("sft", 9, headline="loss", stream=stream, interval=0) as bar:
        for step, loss in enumerate((1.0, 2.0, None, math.nan), 1):
            bar.update(step, metrics={"loss": loss})
    assert stream.getvalue().splitlines()[-1].count("loss 1.50") == 1


def test_on_a_terminal_a_bar_is_redrawn(terminal):
    with Progress("distill", 4, headline="loss", stream=terminal) as bar:
        bar.update(2, metrics={"loss": 0.25})
        bar.log("valid [bold]loss[/bold] 0.3")
        bar.update(4)
    text = terminal.getvalue()
    assert "━" in text and "4/4" in text and "\x1b[" in text
    assert "valid [bold]loss[/bold] 0.3\n" in text


def _summary(run):
    return json.loads((run / "summary.json").read_text())


def test_plain_table(run):
    stream = io.StringIO()
    print_table(_summary(run), stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].split()[:4] == ["Size", "Reverse", "KL", "NLL"]
    assert [line.split("  ")[0] for line in lines[2:6]] == [
        "Teacher",
        "Student, start",
        "Student, SFT",
        "Student, MiniLLM",
    ]
    assert "0.533 ± 0.012" in lines[5] and "26.7" in lines[5] and "51 %" in lines[5]
    assert (
        len({line.index("rse KL") + 6 for line in lines[:1]} | {lines[5].index(" ± 0.012") + 8})
        == 1
    )
    assert lines[6].startswith("The MiniLLM student: reverse KL 0.53, 24 % below the SFT student")
    assert "\x1b" not in stream.getvalue()


def test_plain_output_survives_an_ascii_log(run):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    print_table(_summary(run), stream)
    assert b"0.533 ? 0.012" in raw.getvalue()


@pytest.mark.parametrize("columns", [80, 200])
def test_terminal_table_fits_its_width(run, terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    summary = _summary(run)
    summary["models"]["[red]x"] = {"reverse_kl": 0.9}
    if columns == 80:
        del summary["models"]["start"]
    print_table(summary, terminal)
    text = terminal.getvalue()
    for cell in ("0.533 ± 0.012", "0.701 ± 0.016", "86.9 %", "[red]x", "Greedy repetition"):
        assert cell in text
    assert "…" not in text
    assert ("nats/token" in text) is (columns == 200)
    if columns == 200:
        assert any("[red]x" in line and "0.900" in line for line in text.splitlines())


def test_empty_summary_prints_nothing():
    stream = io.StringIO()
    print_table({"format": 1}, stream)
    assert stream.getvalue() == ""
