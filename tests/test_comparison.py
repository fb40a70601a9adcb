"""Several methods over several seeds: what they share, the budget, the table, a new start."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from matplotlib.figure import Figure

from minillm_jax import comparison, pipeline, trainer
from minillm_jax.build import Builder
from minillm_jax.data import classification
from minillm_jax.data.examples import Example
from minillm_jax.evaluation.judging import items
from minillm_jax.reporting import comparison as reporting
from minillm_jax.reporting import comparison_page
from minillm_jax.reporting.writers import MetricsWriter
from minillm_jax.stages import Run
from minillm_jax.types import InputError
from tests.toy_run import compilation_cache, one_device, toy_config


def finished(workdir):
    return {
        file.relative_to(workdir).as_posix(): json.loads(file.read_text())["finished"]
        for file in workdir.glob("seed*/stages/*/done.json")
    }


def test_two_methods_over_two_seeds(tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    config, workdir = toy_config(tmp_path), tmp_path / "compare"
    config.evaluate.exposure_samples = 2
    sentences = tmp_path / "sentences.jsonl"
    sentences.write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 0}\n')
    config.evaluate.calibration, config.data.max_prompt = (f"sst2:1={sentences}",), 118
    config.distill.keep, config.distill.cache_teacher = "loss", "states"
    methods = ["kd", "gkd"]
    with compilation_cache(tmp_path / "programs"):
        table = comparison.compare(config, workdir, methods, seeds=2)
        # One model of a seed is lost, and the others are not made again.
        lost, before = workdir / "seed1/stages/gkd/done.json", finished(workdir)
        (workdir / "seed1/stages/gkd/figures.json").unlink()
        lost.unlink()
        exposure_samples = workdir / "seed1/stages/teacher/exposure-1.jsonl"
        given = exposure_samples.read_bytes()
        trained, fit = [], trainer.fit
        monkeypatch.setattr(trainer, "fit", lambda *a, **b: trained.append(1) or fit(*a, **b))
        again = comparison.compare(config, workdir, methods, seeds=2)
    assert len(trained) == 1 and again == table
    after = finished(workdir)
    changed = {name for name, when in after.items() if when != before[name]}
    assert changed == {"seed1/stages/gkd/done.json"}
    shared = [
        f"seed{seed}/stages/{name}/done.json" for seed in (0, 1) for name in comparison.SHARED[1:]
    ]
    assert set(shared) < set(after) and len(after) == 10

    assert list(table) == ["teacher", "start", "kd", "gkd"]
    for seed in (0, 1):
        stages = workdir / f"seed{seed}" / "stages"
        done = {name: json.loads((stages / name / "done.json").read_text()) for name in methods}
        own = json.loads((stages / "student_sft" / "done.json").read_text())["tokens"]
        budget = done["kd"]["budget"]
        assert done["gkd"]["budget"] == budget and done["gkd"]["updates"] < done["kd"]["updates"]
        assert done["gkd"]["all_tokens"] == own + done["gkd"]["tokens"]
        for name in methods:
            spent, each = done[name]["all_tokens"], done[name]["tokens"] / done[name]["updates"]
            assert spent == table[name]["tokens"]["values"][seed]
            assert budget - 1.5 * each < spent < budget + 1.5 * each
    assert exposure_samples.read_bytes() == given  # the teacher's, for all students of a seed
    for model in ("start", *methods):
        found = json.loads((workdir / f"seed0/stages/{model}/figures.json").read_text())
        curve, reliability = found["exposure_bias"], found["calibration"]["sst2"]
        last = curve["excess"][curve["reach"] - 1] / 100
        assert table[model]["exposure_bias"]["values"][0] == pytest.approx(last)
        assert table[model]["ece_sst2"]["values"][0] == reliability["ece"]
        assert (reliability["rows"], reliability["given"]) == (1, 2)
        responses = (workdir / f"seed0/stages/{model}/responses.jsonl").read_text().splitlines()
        assert len(responses) == 2 and json.loads(responses[0])["model"] == model
    # What a judge is given has every model and seed once.
    rows = [json.loads(line) for line in (workdir / "responses.jsonl").read_text().splitlines()]
    each = {(row["model"], row["seed"], row["row"]) for row in rows}
    assert len(each) == len(rows) == 2 * 2 * 4
    found = items(rows, "pairwise", "kd")
    assert {(one.model, one.seed) for one in found} == {
        (model, seed) for model in ("teacher", "start", "gkd") for seed in (0, 1)
    }
    assert "exposure_bias" not in table["teacher"] and "accuracy_sst2" in table["teacher"]
    assert (workdir / "exposure.png").read_bytes()[:4] == b"\x89PNG"
    assert "tokens" not in table["start"] and "reverse_kl" not in table["teacher"]
    assert table["kd"]["reverse_kl"]["mean"] != table["gkd"]["reverse_kl"]["mean"]
    assert table["kd"]["nll"]["std"] > 0
    written = json.loads((workdir / "compare.json").read_text())
    assert written == {"seeds": 2, "models": table}
    assert (workdir / "compare.png").read_bytes()[:4] == b"\x89PNG"
    curves = comparison._curves(workdir)
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(curves["valid_loss"]) == methods and len(curves["valid_loss"]["gkd"]) == 2
    for method, seeds in curves["valid_loss"].items():
        ends = [curve[-1][0] for curve in seeds]
        assert ends == table[method]["tokens"]["values"]
    shown = (workdir / "report.html").read_text()
    for words in (
        "Student, KD", "deviation over seeds", "<h2>Methods", "Exposure bias", "Reliability, sst2",
        "<h2>Sample answers", "config toy · seeds 0, 1",
    ):  # fmt: skip
        assert words in shown, words
    assert " k ± " not in shown  # nobody's size differs between seeds
    text = (workdir / "compare.md").read_text()
    assert text.strip() in capsys.readouterr().err

    with pytest.raises(InputError, match="compares at --tokens=0, not at 500: give another"):
        comparison.compare(config, workdir, methods, 2, tokens=500)
    config.distill.learning_rate = 1e-2
    with pytest.raises(InputError, match="holds a run of another config .distill.learning_rate"):
        comparison.compare(config, workdir, methods, 2)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config, workdir = toy_config(tmp_path), tmp_path / "compare"
    with pytest.raises(InputError, match="config.method='dpo': choose from minillm, sft"):
        comparison.compare(config, workdir, ["kd", "dpo"], 2)
    config.distill.parameter = 2.0
    with pytest.raises(InputError, match="parameter=2.0: beta of jsd lies from 0 to 1"):
        comparison.compare(config, workdir, ["sft", "gkd"], 2)
    assert not workdir.exists()
    config.distill.parameter = None
    monkeypatch.setattr(pipeline, "run_stage", lambda run, name, stage: None)
    monkeypatch.setattr(comparison, "_judge", lambda run, name, make: None)
    monkeypatch.setattr(
        comparison, "answered", lambda run, split, source: run.build.data.prompts(split)
    )
    with pytest.raises(InputError, match="a budget of 2 tokens leaves none for kd"):
        comparison.compare(config, workdir, ["kd"], 1, tokens=2)


def test_rows_of_calibration_that_fit_nowhere_are_refused(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config, file = toy_config(tmp_path), tmp_path / "sentences.jsonl"
    file.write_text('{"sentence": "a", "label": 1}\n')
    task = replace(classification.TASKS["sst2"], labels=("Name two birds.", "Name a bird."))
    monkeypatch.setitem(classification.TASKS, "sst2", task)
    config.evaluate.calibration, config.data.max_prompt = (f"sst2={file}",), 112
    (examples, _) = Builder(config, tmp_path).data.labelled()["sst2"].examples
    config.data.max_response = 1  # how long answers may be says nothing of the labels
    (again, _) = Builder(config, tmp_path).data.labelled()["sst2"].examples
    assert len(again[0].response) > 1 and again[0].response == examples[0].response
    config.data.max_prompt = len(examples[0].prompt) - config.data.max_response + 1
    with pytest.raises(InputError, match="sentences.jsonl: no row fits into config.data.max_p"):
        Builder(config, tmp_path).data.labelled()


def test_the_schedule_is_that_of_the_rows_which_a_method_reads(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.answers.source = "data"
    long = {"data": 5, "teacher": 15}
    rows = {name: [Example((1,) * 5, (1,) * size, 0)] for name, size in long.items()}
    monkeypatch.setattr(comparison, "answered", lambda run, split, source: rows[source])
    for method, steps in (("kd", 10), ("seqkd", 5)):
        with MetricsWriter(tmp_path) as metrics:
            run = Run(Builder(comparison._of(config, method, 0), tmp_path), tmp_path, metrics)
        comparison._within(run, 800, [])
        assert run.build.config.distill.steps == steps


def test_targets_are_kept_for_the_methods_that_can_read_them(tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.distill.cache_teacher = "top4"
    methods = ["kd", "jsd", "seqkd", "seqkd_kd", "gkd", "distillm", "minillm"]
    for source, keep in (("data", ["kd", "jsd"]), ("teacher", ["kd", "jsd", "seqkd_kd"])):
        config.answers.source = source
        stages = {
            method: pipeline.planned(Builder(comparison._of(config, method, 0), tmp_path)).stages
            for method in methods
        }
        assert [method for method in methods if "teacher_targets" in stages[method]] == keep
        comparison._say_who_keeps(config, methods)
        said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
        assert said == [method for method in methods if method not in keep]
    with pytest.raises(InputError, match="cache_teacher=top4: none of gkd, minillm meets the"):
        comparison.compare(config, tmp_path / "compare", ["gkd", "minillm"], 1)


def test_columns_that_only_some_settings_have_follow_the_others():
    seeds = [{"kd": {"nll": 1.0, "ece_sst2": 0.1, "rouge_l_deviation": 1.0, "entropy": 2.0}}]
    seeds += [{"gkd": {"exposure_bias": 0.1, "rouge_l_vicuna": 0.2, "rouge_l_vicuna_deviation": 0}}]
    further = ("ece_sst2", "exposure_bias", "rouge_l_vicuna")
    assert reporting.columns(seeds) == (*reporting.SHOWN, *further)


def test_the_table_is_of_means_and_deviations(tmp_path):
    seeds = [
        {"start": {"nll": 2.0}, "kd": {"nll": 1.0, "rouge_l": 0.3, "tokens": 90}},
        {"start": {"nll": 2.0}, "kd": {"nll": 2.0, "rouge_l": None, "tokens": 110}},
        {"start": {"nll": 5.0}},
    ]
    table = reporting.tabulate(seeds, ("tokens", "nll", "rouge_l"))
    assert table["kd"]["nll"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5), "values": [1.0, 2.0]}
    assert table["kd"]["rouge_l"] == {"mean": 0.3, "std": None, "values": [0.3]}
    assert reporting.as_text(table, ("tokens", "nll", "rouge_l")).splitlines() == [
        "| model | tokens | nll | rouge_l |",
        "|---|---|---|---|",
        "| start |  | 3.000 ± 1.732 |  |",
        "| kd | 100 ± 14 | 1.500 ± 0.707 | 0.300 |",
    ]
    reporting.draw(tmp_path / "new" / "table.png", table)
    assert (tmp_path / "new" / "table.png").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, and written all the same."""
    found, save = [], Figure.savefig

    def spy(figure, *args, **options):
        found.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


def test_bars_that_are_all_0_stand_at_the_left(tmp_path, drawn):
    none = {"mean": 0.0, "std": None, "values": [0.0]}
    reporting.draw(tmp_path / "table.png", {"kd": {"rouge_l": none}}, ["rouge_l"])
    assert drawn[0].axes[0].get_xlim() == (0, 1)


def test_curves_are_means_over_the_validations_that_all_seeds_have(tmp_path, drawn):
    rows = [{"tokens": 5}, {"tokens": 7}, {"valid_loss": 2.0}, {"tokens": 4}, {"valid_loss": None}]
    assert reporting.curve([*rows, {"valid_loss": 1.0}], "valid_loss", 100) == [(112, 2), (116, 1)]
    seeds = [[(10, 2.0), (20, 1.0)], [(14, 4.0), (22, 1.0), (30, 0.5)]]
    assert reporting.over_seeds(seeds) == ([12, 21], [3, 1], [pytest.approx(2**0.5), 0])
    file = tmp_path / "curves.png"
    reporting.draw_curves(file, {"valid_reverse_kl": {"kd": [[]]}, "valid_loss": {}})
    assert not file.exists()
    reporting.draw_curves(file, {"valid_reverse_kl": {"kd": seeds, "gkd": [[]]}})
    assert file.stat().st_size > 1000
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["KD"]


def test_exposure_bias_is_drawn_as_far_as_the_answers_of_all_seeds_reach(tmp_path, drawn):
    file = tmp_path / "exposure.png"
    reporting.draw_exposure(file, {})
    assert not file.exists()
    seeds = [{"excess": [0.0, 2.0, 9.0], "reach": 2}, {"excess": [0.0, 4.0, 6.0], "reach": 3}]
    reporting.draw_exposure(file, {"minillm": seeds})
    (axes,) = drawn[0].axes
    line = axes.get_lines()[-1]
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [0, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MiniLLM"]


def test_the_page_has_the_means_of_the_seeds():
    def bins(count, accuracy):
        return {
            "ece": accuracy,
            "bins": [dict(low=0.5, count=count, confidence=0.6, accuracy=accuracy)],
        }

    def seed(scale):
        bias = {"excess": [0.0, scale, 9.0], "deviation": [0.0] * 3, "reach": 2}
        lengths = {"test": {"0-5": {"count": 3, "rouge_l": 0.1 * scale}}}
        return {
            "kd": {
                "figures": {"nll": scale, "reverse_kl": 1.0, "reverse_kl_stderr": scale},
                "exposure_bias": bias,
                "calibration": {"sst2": bins(scale, scale / 4)},
                "lengths": lengths,
            },
            "teacher": {"figures": {"nll": 1.0}},
        }

    seeds = [seed(1), seed(3)]
    means = comparison_page._means([{m: one["figures"] for m, one in s.items()} for s in seeds])
    assert means["kd"] == {
        "nll": 2, "reverse_kl": 1, "reverse_kl_stderr": 2,
        "nll_deviation": pytest.approx(2**0.5), "reverse_kl_deviation": 0,
    }  # fmt: skip
    found = comparison_page._measures(seeds)
    curve = {"excess": [0, 2], "deviation": [0, pytest.approx(2**0.5)], "reach": 2}
    curve["over"] = "seeds"
    assert found["exposure_bias"] == {"kd": curve}
    # 1 row of which a quarter is right, and 3 of which three quarters are.
    pooled = {"low": 0.5, "count": 4, "confidence": pytest.approx(0.6), "accuracy": 0.625}
    assert found["calibration"] == {"sst2": {"kd": {"ece": 0.5, "bins": [pooled]}}}
    bucket = found["lengths"]["test"]["kd"]["0-5"]
    assert bucket["count"] == 3 and bucket["rouge_l"] == pytest.approx(0.2)
    assert comparison_page._means([{"kd": {"nll": 1.0}}]) == {"kd": {"nll": 1.0}}  # no deviation
    own = comparison_page._measures(seeds[:1])["exposure_bias"]["kd"]
    assert own == seeds[0]["kd"]["exposure_bias"]  # with its deviation over prompts
    both = comparison_page._side_by_side(
        {m: [{"instruction": "Do.", "answers": {m: m}, "samples": {}}] for m in ("kd", "teacher")}
    )
    assert both == [
        {"instruction": "Do.", "answers": {"kd": "kd", "teacher": "teacher"}, "samples": {}}
    ]
    page = comparison_page.page([{"name": "x", "seed": 0}], seeds[:1], {}, {})
    assert "Student, KD" in page and "standard error" in page and "<h2>Methods" not in page


@pytest.mark.parametrize(
    ("files", "coefficient", "policy_gradient", "tokens"),
    [
        (("answers",), 0.3, True, 97),  # a row with its answer beside each
        (("a.txt",), 1.0, True, 140),  # a block
        ((), 1.0, True, 0),
        (("answers",), 0.0, True, 0),
        (("answers",), 0.3, False, 0),  # no other method reads a corpus
    ],
)
def test_a_schedule_has_room_for_the_corpus(
    files, coefficient, policy_gradient, tokens, monkeypatch
):
    monkeypatch.setattr(comparison, "_row_tokens", lambda run, source="": 97)
    build: Any = SimpleNamespace(
        outline=SimpleNamespace(policy_gradient=policy_gradient),
        config=SimpleNamespace(corpus=SimpleNamespace(files=files, coefficient=coefficient)),
        data=SimpleNamespace(max_tokens=140),
    )
    assert comparison._corpus_row_tokens(cast(Any, SimpleNamespace(build=build))) == tokens
