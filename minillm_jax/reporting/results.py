"""What `summary.json` says of the models: the columns of the table and the findings in words.

Shared by the terminal's table and the report. A model or a figure that is absent shows as a dash,
or takes its row or column away.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minillm_jax.reporting import formats
from minillm_jax.reporting.formats import is_number

Summary = Mapping[str, Any]

LABELS = {
    "teacher": "Teacher",
    "start": "Student, start",
    "sft": "Student, SFT",
    "kd": "Student, KD",
    "seqkd": "Student, SeqKD",
    "seqkd_kd": "Student, SeqKD with KD",
    "gkd": "Student, GKD",
    "jsd": "Student, JSD",
    "opd": "Student, on-policy",
    "skew_kl": "Student, skew KL",
    "skew_reverse_kl": "Student, skew reverse KL",
    "distillm": "Student, DistiLLM",
    "distillm_srkl": "Student, DistiLLM, reverse",
    "tvd": "Student, TVD",
    "akl": "Student, AKL",
    "taid": "Student, TAID",
    "minillm": "Student, MiniLLM",
}
_IN_A_SENTENCE = {
    "teacher": "the teacher",
    "start": "the student at start",
    "sft": "the SFT student",
    "kd": "the KD student",
    "seqkd": "the SeqKD student",
    "seqkd_kd": "the student of SeqKD with KD",
    "minillm": "the MiniLLM student",
}


@dataclass(frozen=True)
class Column:
    """One figure of a model: its key in the summary, heading, unit, way of showing, and meaning."""

    key: str
    label: str
    unit: str
    show: Callable[[float | None], str]
    meaning: str
    better: str = ""  # "lower" or "higher", where that is so


COLUMNS = (
    Column("parameters", "Size", "parameters", formats.count, "number of parameters"),
    Column(
        "reverse_kl",
        "Reverse KL",
        "nats/token",
        formats.fixed,
        "exact, per token, from the student to the teacher at its temperature, on the student's "
        "own samples",
        "lower",
    ),
    Column(
        "nll",
        "NLL",
        "nats/token",
        formats.fixed,
        "negative log-likelihood per token of the reference answers",
        "lower",
    ),
    Column(
        "rouge_l",
        "Rouge-L",
        "F1 × 100",
        lambda value: formats.fixed(None if value is None else 100 * value, 1),
        "longest common subsequence of words with the reference",
        "higher",
    ),
    Column(
        "exposure_bias",
        "Exposure bias",
        "ExAccErr",
        formats.percent,
        "error that reading its own words adds to that on the teacher's, over the whole length",
        "lower",
    ),
    Column(
        "top_k_overlap",
        "Top-k overlap",
        "of the likeliest",
        formats.percent,
        "the student's likeliest tokens that are among the teacher's, on the student's samples",
        "higher",
    ),
    Column(
        "entropy",
        "Entropy",
        "nats/token",
        formats.fixed,
        "of the student's distribution, per token, on its own samples",
    ),
    Column("length", "Length", "tokens", lambda value: formats.fixed(value, 1), "mean length"),
    Column(
        "finished",
        "Finished",
        "of answers",
        lambda value: formats.percent(value, 0),
        "answers that end by themselves within the length limit",
    ),
    Column(
        "distinct_4",
        "Distinct-4",
        "of 4-grams",
        formats.percent,
        "distinct 4-grams over all 4-grams of the answers",
    ),
    Column(
        "self_rouge_l",
        "Self-Rouge-L",
        "F1 × 100",
        lambda value: formats.fixed(None if value is None else 100 * value, 1),
        "Rouge-L between a model's answers to different prompts: how much alike they are",
    ),
    Column(
        "repetition",
        "Repetition",
        "of 4-grams",
        formats.percent,
        "4-grams of an answer that occurred earlier in it, sampled answers",
        "lower",
    ),
    Column(
        "greedy_repetition",
        "Greedy repetition",
        "of 4-grams",
        formats.percent,
        "4-grams of an answer that occurred earlier in it, greedy answers",
        "lower",
    ),
    Column(
        "greedy_loops",
        "Greedy loops",
        "of answers",
        formats.percent,
        "greedy answers caught in a loop",
        "lower",
    ),
)

DEVIATION, STDERR = "_deviation", "_stderr"  # ends of keys: of a mean over seeds, over responses
_ROUGE_L = next(column for column in COLUMNS if column.key == "rouge_l")
_BY_DATA = (
    Column(
        "ece",
        "ECE",
        "calibration error",
        formats.fixed,
        "difference between confidence and accuracy on the label words",
        "lower",
    ),
    Column("accuracy", "Accuracy", "of rows", formats.percent, "right label words", "higher"),
)


def ordered(present: Iterable[str]) -> list[str]:
    """Names of models, the known ones first and in the order of the pipeline."""
    present = list(present)
    return [m for m in LABELS if m in present] + [m for m in present if m not in LABELS]


def models(summary: Summary) -> list[str]:
    """The models of the summary, `ordered`."""
    return ordered(summary.get("models") or {})


def label(model: str) -> str:
    """The heading of a model."""
    return LABELS.get(model, model)


def value(summary: Summary, model: str, key: str) -> float | None:
    """One figure of one model; None when it is absent, null or not finite."""
    number = ((summary.get("models") or {}).get(model) or {}).get(key)
    return number if is_number(number) else None


def columns(summary: Summary) -> list[Column]:
    """The columns in which at least one model has a figure, further test sets last."""
    present = {
        key: None for m in models(summary) for key in (summary.get("models") or {}).get(m) or {}
    }
    plain = [key for key in present if not key.endswith((DEVIATION, STDERR))]
    sets = [
        _of_data(column, key.removeprefix(f"{column.key}_"))
        for column in (_ROUGE_L, *_BY_DATA)
        for key in plain
        if key.startswith(f"{column.key}_")
    ]
    return [
        c
        for c in (*COLUMNS, *sets)
        if any(value(summary, m, c.key) is not None for m in models(summary))
    ]


def _of_data(column: Column, name: str) -> Column:
    return replace(column, key=f"{column.key}_{name}", label=f"{column.label}, {name}")


def error(summary: Summary, model: str, key: str) -> float | None:
    """What stands after the ±: the deviation over seeds, with one seed the standard error."""
    over_seeds = value(summary, model, key + DEVIATION)
    return over_seeds if over_seeds is not None else value(summary, model, key + STDERR)


def cell(summary: Summary, model: str, column: Column) -> str:
    """One figure as text, with its `error` where the summary has one."""
    text = column.show(value(summary, model, column.key))
    after = error(summary, model, column.key)
    return f"{text} ± {column.show(after)}" if after is not None else text


def has_seeds(summary: Summary) -> bool:
    """Whether the figures are means over several seeds."""
    keys = {key for m in models(summary) for key in (summary.get("models") or {}).get(m) or {}}
    return any(key.endswith(DEVIATION) for key in keys)


@dataclass(frozen=True)
class Comparison:
    """The reverse KL of a model beside that of the model it came from."""

    model: str
    base: str
    reverse_kl: float
    base_reverse_kl: float
    within_noise: bool

    @property
    def change(self) -> float:
        """Relative change: -0.24 is 24 % below the base."""
        return self.reverse_kl / self.base_reverse_kl - 1

    def __str__(self) -> str:
        name, base = (_IN_A_SENTENCE.get(m, m) for m in (self.model, self.base))
        where = "below" if self.change < 0 else "above"
        noise = ", within two standard errors" if self.within_noise else ""
        return (
            f"{name[0].upper()}{name[1:]}: reverse KL {self.reverse_kl:.2f}, "
            f"{100 * abs(self.change):.0f} % {where} {base} ({self.base_reverse_kl:.2f}){noise}"
        )


def comparisons(summary: Summary) -> list[Comparison]:
    """Each student against the one before it, the last student first."""
    students = [
        m for m in models(summary) if m != "teacher" and value(summary, m, "reverse_kl") is not None
    ]
    found = []
    for model in reversed(students):
        # A method begins with the SFT student where there is one; that came from the start.
        order = [m for m in students[: students.index(model)] if m in ("start", "sft")]
        if not order:
            continue
        new, old = (value(summary, m, "reverse_kl") or 0.0 for m in (model, order[-1]))
        errors = [value(summary, m, "reverse_kl_stderr") for m in (model, order[-1])]
        noise = math.hypot(*(e or 0.0 for e in errors))
        if old > 0:
            found.append(Comparison(model, order[-1], new, old, abs(new - old) < 2 * noise))
    return found


def findings(summary: Summary) -> list[str]:
    """What the run found, one line each, the main one first."""
    lines = [str(comparison) for comparison in comparisons(summary)]
    shown = [m for m in ("minillm", "sft", "start", "teacher") if m in models(summary)]
    for key, what in (
        ("greedy_loops", "Greedy answers that loop"),
        ("greedy_repetition", "Repeated 4-grams in greedy answers"),
    ):
        figures = [
            f"{_IN_A_SENTENCE[m]} {formats.percent(value(summary, m, key))}"
            for m in shown
            if value(summary, m, key) is not None
        ]
        if figures:
            lines.append(f"{what}: {', '.join(figures)}")
            break
    return lines
