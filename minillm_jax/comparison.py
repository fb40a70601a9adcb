"""Several methods from the same students, on the same data, for as many tokens, over seeds.

    workdir/compare.{json,md,png}               the table of what is done
            curves.png, exposure.png            validations by tokens read; ExAccErr, if measured
            report.html                         all of it, and the answers of the first seed
            responses.jsonl                     answers of all models and seeds, for `judge`
            seedN/stages/teacher_answers/...    teacher_sft, student_sft: once, for all methods
                         METHOD/...             as the stage `distill` has it; figures.json,
                                                answers.jsonl and responses.jsonl of the held-out
                                                prompts, as `evaluate` has them

The budget counts tokens, prompt and answer, that the student is trained on from its first update
on, so what SFT read before a method that starts from it counts, too. An update is a whole batch: a
method ends after the first one that reaches the budget. The length of its schedule follows from
the mean length of the rows that are given to it, and of the text of a corpus loss. A student that
writes its own answers does not keep to that: shorter ones leave it a little below the budget, which
the column `tokens` shows, and longer ones end its schedule a little early.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from minillm_jax import hosts, pipeline, recipe
from minillm_jax.build import Builder
from minillm_jax.check import meets_on_given
from minillm_jax.methods import registry
from minillm_jax.modelfiles import Model
from minillm_jax.reporting import comparison as reporting
from minillm_jax.reporting.comparison_page import page
from minillm_jax.reporting.writers import (
    MetricsWriter,
    read_json,
    read_rows,
    write_json,
    write_rows,
    write_text,
)
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import answered
from minillm_jax.stages.comparisons import ExposureBias
from minillm_jax.stages.evaluation import by_prompt, judge
from minillm_jax.stages.held_out import main_set
from minillm_jax.stages.plan import Stage
from minillm_jax.stages.training import distill, fine_tune, student
from minillm_jax.types import InputError
from minillm_jax.workdir import claimed, refuse_another

SHARED = ("teacher_sft", "teacher_answers", "student_sft", "teacher_targets")


def compare(config: Any, workdir: Path, methods: Sequence[str], seeds: int, tokens: int = 0) -> Any:
    """Train and judge what is not done, and return the table, which is printed and drawn.

    Args:
        seeds: how many, counted from the config's own.
        tokens: the budget; 0: what the config's own SFT and distillation would read.

    Raises:
        InputError: a method or a setting that cannot be right, or a work directory of another
            comparison; before anything is trained.
    """
    if seeds < 1 or not methods:
        raise InputError("nothing to compare: give --methods=sft,kd and --seeds of at least 1")
    config = config.copy_and_resolve_references()
    for method in methods:
        Builder(_of(config, method, config.seed), workdir)
    if config.distill.cache_teacher:
        _say_who_keeps(config, methods)
    _refuse_another(workdir, tokens)
    numbers = range(config.seed, config.seed + seeds)
    for seed in numbers:
        place = workdir / f"seed{seed}"
        refuse_another(place, _of_seed(config, seed))
    write_json(workdir / "budget.json", {"tokens": tokens})
    for seed in numbers:
        place = workdir / f"seed{seed}"
        if not (place / "config.json").exists():
            write_json(place / "config.json", _of_seed(config, seed).to_dict())
        with claimed(place), MetricsWriter(place) as metrics:
            for method in methods:
                build = Builder(_of(config, method, seed), place)
                one(Run(build, place, metrics), tokens)
    return report(workdir)


def one(run: Run, tokens: int) -> None:
    """Train and judge the method of `run`, after the stages that all methods of its seed share."""
    build, method = run.build, run.build.outline.method
    stages = dict(pipeline.planned(build).stages)
    trains = [name for name in SHARED if name in stages]
    if "distill" not in stages:  # `sft` is a method here: it starts where SFT does
        trains = [name for name in trains if name != "student_sft"]
    build.preflight([*trains, "distill"] if "distill" in stages else trains)
    for name in trains:
        _once(run, name, stages)
        if name == "teacher_sft":
            build.follow(run.model(name))
    _judge(run, "teacher", lambda: build.teacher)
    _judge(run, "start", build.student)
    stages[method] = _within(run, tokens or _own_budget(run), trains)
    _once(run, method, stages)
    _judge(run, method, lambda: build.student(run.model(method)))


def report(workdir: Path) -> reporting.Table:
    """Print and write the table of what is done in a work directory."""
    places = sorted(workdir.glob("seed*"))
    judged = [_judged(place) for place in places]
    seeds = [{m: found["figures"] for m, found in models.items()} for models in judged]
    columns = reporting.columns(seeds)
    table = reporting.tabulate(seeds, columns)
    text = reporting.as_text(table, columns)
    print(text, file=hosts.log())
    write_json(workdir / "compare.json", {"seeds": len(seeds), "models": table})
    write_text(workdir / "compare.md", text + "\n")
    reporting.draw(workdir / "compare.png", table)
    curves = _curves(workdir)
    reporting.draw_curves(workdir / "curves.png", curves)
    biases = reporting.of_models(judged, "exposure_bias")
    reporting.draw_exposure(workdir / "exposure.png", biases)
    configs = [read_json(place / "config.json") for place in places]
    files = {model: places[0] / "stages" / model / "answers.jsonl" for model in judged[0]}
    answers = {model: read_rows(file) for model, file in files.items() if file.exists()}
    write_rows(workdir / "responses.jsonl", _responses(workdir))
    write_text(workdir / "report.html", page(configs, judged, curves, answers))
    return table


def _responses(workdir: Path) -> Iterator[dict[str, Any]]:
    """Those of all models; `seed` counts the seeds of training and, within them, of sampling."""
    seeds: dict[tuple[str, int], int] = {}
    for file in sorted(workdir.glob("seed*/stages/*/responses.jsonl")):
        for row in read_rows(file):
            own = seeds.setdefault((file.parts[-4], row["seed"]), len(seeds))
            yield row | {"seed": own}


def _judged(place: Path) -> dict[str, Any]:
    """`figures.json` of the models of a seed, in the order in which they were judged."""
    files = sorted(place.glob("stages/*/figures.json"), key=lambda f: f.stat().st_mtime)
    return {file.parent.name: read_json(file) for file in files}


def _curves(workdir: Path) -> dict[str, dict[str, list[reporting.Curve]]]:
    """The validations of the methods that are done, by metric and method."""
    found: dict[str, dict[str, list[reporting.Curve]]] = {name: {} for name in reporting.CURVES}
    for place in sorted(workdir.glob("seed*")):
        rows = read_rows(place / "metrics.jsonl")
        for method in _judged(place):
            done = pipeline.read_done(place, method) or {}
            if "all_tokens" not in done:  # the teacher, or the student at the start
                continue
            own = [row for row in rows if row.get("stage") == method]
            before = done["all_tokens"] - done["tokens"]
            for name, by in found.items():
                by.setdefault(method, []).append(reporting.curve(own, name, before))
    return found


def _of(config: Any, method: str, seed: int) -> Any:
    """The experiment of one method and seed; targets are kept for those that can read them."""
    without = bool(config.distill.cache_teacher) and not _keeps(config, method)
    config = config.copy_and_resolve_references()
    config.method, config.seed = method, seed
    if without:
        config.distill.cache_teacher = ""
    return config


def _say_who_keeps(config: Any, methods: Sequence[str]) -> None:
    without = [method for method in methods if not _keeps(config, method)]
    if len(without) == len(methods):
        raise InputError(
            f"config.distill.cache_teacher={config.distill.cache_teacher}: none of "
            f"{', '.join(methods)} meets the teacher on the given answers alone, so nothing can be "
            "kept; leave it empty"
        )
    for method in without:
        print(f"{method}: has no use for kept targets", file=hosts.log())


def _of_seed(config: Any, seed: int) -> Any:
    """What all methods of a seed have in common: the config as it is given."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def _keeps(config: Any, method: str) -> bool:
    """Whether `teacher_targets`, which is of one origin of answers, serves a method, too."""
    own = config.copy_and_resolve_references()
    own.method = method
    own = registry.resolved(own)
    origins = {c.distill.answers or c.answers.source for c in (config, own)}
    return meets_on_given(own) and len(origins) == 1


def _once(run: Run, name: str, stages: dict[str, Stage]) -> None:
    if pipeline.is_done(run.workdir, stages, name):
        print(f"{name}: done, in {run.folder(name)}", file=hosts.log())
    else:
        pipeline.run_stage(run, name, stages[name])


def _judge(run: Run, name: str, make: Callable[[], Model]) -> None:
    """Write the held-out figures of a model, unless they are there and that model's.

    Teacher and start are what the first method of a seed found.
    """
    done = pipeline.read_done(run.workdir, name) or {}
    made = {key: done[key] for key in ("finished", "all_tokens") if key in done}
    file = run.folder(name) / "figures.json"
    if file.exists() and read_json(file)["made"] == made:
        return
    with jax.set_mesh(run.build.mesh):
        bias = ExposureBias(run, main_set(run), keep=run.folder("teacher"))
        judged = judge(run, bias, make(), name=name)
    write_rows(run.folder(name) / "responses.jsonl", judged.held.responses)
    write_rows(run.folder(name) / "answers.jsonl", by_prompt(run, {name: judged.held}))
    figures = judged.held.figures | ({"tokens": made["all_tokens"]} if made else {})
    measured = {
        "exposure_bias": judged.exposure_bias,
        "calibration": judged.calibration,
        "lengths": judged.held.lengths,
    }
    write_json(file, {"figures": figures, "made": made} | measured)


def _row_tokens(run: Run, source: str = "") -> float:
    """Mean tokens of a training row, prompt and answer, of the answers that `answered` knows."""
    rows = answered(run, "train", source)
    return sum(len(row.prompt) + len(row.response) for row in rows) / len(rows)


def _corpus_row_tokens(run: Run) -> float:
    """Mean tokens of the text that is read beside a row; 0 without a corpus loss."""
    corpus = run.build.config.corpus
    if not (run.build.outline.policy_gradient and corpus.files and corpus.coefficient):
        return 0
    answers = recipe.learns_from_answers(corpus.files)
    return _row_tokens(run) if answers else run.build.data.max_tokens


def _own_budget(run: Run) -> int:
    """Tokens of the config's own SFT and distillation, at the mean length of the given rows."""
    parts = [run.build.config[section] for section in ("sft", "distill")]
    epoch = len(answered(run, "train"))
    rows = sum(c.epochs * epoch if c.epochs else c.steps * c.batch_size for c in parts)
    return round(rows * _row_tokens(run))


def _within(run: Run, budget: int, shared: Sequence[str]) -> Stage:
    """The method of `run` as a stage that reads so many tokens, those of its start included."""
    build, method = run.build, run.build.outline.method
    section = "sft" if build.outline.entry.kind == "sft" else "distill"
    done = pipeline.read_done(run.workdir, "student_sft") if "student_sft" in shared else None
    before = done["tokens"] if done else 0
    c = build.config[section]
    each = _row_tokens(run, build.outline.given) + _corpus_row_tokens(run)
    steps = round((budget - before) / (c.batch_size * each))
    if steps < 1:
        raise InputError(
            f"a budget of {budget} tokens leaves none for {method}, whose start has read {before}: "
            "raise --tokens, or lower config.sft.steps"
        )
    c.steps, c.epochs = steps, 0.0
    recipe.judge(section, build.section(section), build.ways)

    def function(run: Run) -> Outcome:
        rest = budget - before
        if section == "sft":
            outcome = fine_tune(run, method, student(run.build), tokens=rest)
        else:
            outcome = distill(run, method, tokens=rest)
        return outcome | {"budget": budget, "all_tokens": before + outcome["tokens"]}

    return Stage(function, tuple(shared), section=section)


def _refuse_another(workdir: Path, tokens: int) -> None:
    file = workdir / "budget.json"
    if file.exists() and (before := read_json(file)["tokens"]) != tokens:
        raise InputError(
            f"{workdir} compares at --tokens={before}, not at {tokens}: give another --workdir, "
            "or that budget"
        )
