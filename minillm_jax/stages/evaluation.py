"""The stage that judges every model on the held-out prompts, and what it writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax import hosts
from minillm_jax.evaluation import exposure
from minillm_jax.modelfiles import Model
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import write_json, write_rows
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.comparisons import ExposureBias, calibrated
from minillm_jax.stages.held_out import HeldOut, held_out, main_set, parts

Makers = Mapping[str, Callable[[], Model]]


@dataclass(frozen=True)
class Judged:
    """All that is measured of a model; `held.figures` has a figure of each of the others, too.

    `exposure_bias` is a curve, empty if not wanted; `calibration` {data: figures and bins}.
    """

    held: HeldOut
    exposure_bias: dict[str, Any]
    calibration: dict[str, dict[str, Any]]


def evaluate(run: Run) -> Outcome:
    """Held-out figures and answers of the teacher and of the student at each stage."""
    build = run.build
    tuned = build.outline.fine_tuned_student
    makers: dict[str, Callable[[], Model]] = {"teacher": lambda: build.teacher}
    if not tuned:
        makers["start"] = build.student
    if tuned or run.model("student_sft").is_dir():
        makers["sft"] = lambda: build.student(None if tuned else run.model("student_sft"))
    if run.model("distill").is_dir():
        makers[build.outline.method] = lambda: build.student(run.model("distill"))
    tokens = judge_models(run, makers, run.workdir / "evaluate", keep=run.folder("evaluate"))
    return {"tokens": tokens, "updates": 0}


def judge(
    run: Run,
    bias: ExposureBias,
    model: Model,
    done: Callable[[int], None] = lambda tokens: None,
    *,
    name: str = "",
    compare: bool = True,
    keep: Path | None = None,
) -> Judged:
    """Judge one model by all that the settings ask for; the arguments are those of `held_out`."""
    build = run.build
    compare = compare and model is not build.teacher
    held = held_out(run, model, done, name=name, compare=compare, keep=keep)
    curve = {}
    if held.measured is not None and build.config.evaluate.exposure_samples:
        curve = bias.curve(model, held.sampled, held.measured)
        held.figures["exposure_bias"] = exposure.last(curve) / 100
    reliability = {data: calibrated(run, model, x) for data, x in build.data.labelled().items()}
    for data, found in reliability.items():
        held.figures.update({f"{key}_{data}": found[key] for key in ("ece", "accuracy")})
    return Judged(held, curve, reliability)


def judge_models(
    run: Run, makers: Makers, folder: Path, *, compare: bool = True, keep: Path | None = None
) -> int:
    """Judge models one after another and write what came of it; returns the tokens it took.

    With `compare` the divergences from the teacher are measured; `keep` as for `held_out`. In
    `folder`:

        figures.json         {model: figures}, of the main test set
        tests.json           {test set: {model: {decoding: figures}}}, plain and with the n-gram ban
        lengths.json         {test set: {model: {bucket of the reference's length: figures}}}
        exposure_bias.json   {model: curve}
        calibration.json     {data: {model: figures and bins}}
        answers.jsonl        a row per prompt: greedy answers, sampled ones by token with log(p/q)
        responses.jsonl      a row per sampled answer of every model, test set, seed and decoding
    """
    bias = ExposureBias(run, main_set(run), keep)
    judged: dict[str, Judged] = {}
    told: list[int] = []
    with Progress("evaluate", parts(run) * len(makers)) as bar:

        def done(tokens: int) -> None:
            told.append(tokens)
            bar.update(len(told), tokens=tokens)

        for name, make in makers.items():
            judged[name] = judge(run, bias, make(), done, name=name, compare=compare, keep=keep)
    found = {name: one.held for name, one in judged.items()}
    curves = {name: one.exposure_bias for name, one in judged.items() if one.exposure_bias}
    reliability = _turned({name: one.calibration for name, one in judged.items()})
    write_json(folder / "figures.json", {name: one.figures for name, one in found.items()})
    for file, by_model in (
        ("tests.json", {name: one.tests for name, one in found.items()}),
        ("lengths.json", {name: one.lengths for name, one in found.items()}),
    ):
        write_json(folder / file, _turned(by_model))
    for file, measured in (("exposure_bias.json", curves), ("calibration.json", reliability)):
        if measured:
            write_json(folder / file, measured)
        elif hosts.is_main():
            (folder / file).unlink(missing_ok=True)  # of an evaluation with other settings
    write_rows(folder / "answers.jsonl", by_prompt(run, found))
    write_rows(folder / "responses.jsonl", (row for one in found.values() for row in one.responses))
    return sum(told)


def _turned(by_model: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{model: {test: x}} as {test: {model: x}}."""
    turned: dict[str, dict[str, Any]] = {}
    for model, tests in by_model.items():
        for test, value in tests.items():
            turned.setdefault(test, {})[model] = value
    return turned


def by_prompt(run: Run, found: Mapping[str, HeldOut]) -> list[dict[str, Any]]:
    """The answers of models to the prompts of the main test set, a row for each prompt."""
    main = main_set(run)
    return [
        {
            "instruction": main.rows[example.row].instruction,
            "input": main.rows[example.row].input,
            "reference": main.references[number][0],
            "answers": {name: one.greedy[number] for name, one in found.items()},
            "samples": {name: one.samples[number] for name, one in found.items()},
        }
        for number, example in enumerate(main.examples)
    ]
