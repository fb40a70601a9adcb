"""Whole runs on a toy teacher: what they leave, what a second start skips, how they resume."""

import contextlib
import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minillm_jax import assemble, dataset, pipeline, recipe, replay, stopping
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.data import splits
from minillm_jax.models import hf
from minillm_jax.named import by_name
from minillm_jax.stages import answers, evaluation, keeper, training
from minillm_jax.stages.skipped import read_batch
from minillm_jax.types import InputError
from tests.toy_run import (
    PROMPTS,
    command,
    compilation_cache,
    one_device,
    toy_config,
    write_teacher,
)

SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files and the work directory of a run that went through undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    cache = tmp_path_factory.getbasetemp() / "compiled"
    with compilation_cache(cache), pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        for name in SECRETS:
            patch.setenv(name, f"secret of {name}")
        pipeline.execute(toy_config(folder), folder / "run")
        yield folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of that work directory, to spoil, and the config."""
    one_device(monkeypatch)
    shutil.copytree(finished / "run", tmp_path / "run")
    return toy_config(finished), tmp_path / "run"


def files_of(workdir, *but):
    """Time of the last change of every file, without those named."""
    found = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    return {p: t for p, t in found.items() if not any(part in but for part in p.parts)}


def rows(workdir, stage):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["stage"] == stage]


def weights(workdir, stage):
    return load_file(workdir / "stages" / stage / "model" / "model.safetensors")


def undo(workdir, *stages):
    for stage in stages:
        shutil.rmtree(workdir / "stages" / stage)


def test_a_run_leaves_its_summary_report_metrics_and_answers(finished):
    workdir = finished / "run"
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["format"] == 1 and summary["config"] == "toy" and summary["seed"] == 0
    assert set(summary["models"]) == {"teacher", "start", "sft", "minillm"}
    for name, model in summary["models"].items():
        numbers = {k: v for k, v in model.items() if k != "reverse_kl_stderr"}
        assert all(np.isfinite(v) for v in numbers.values()), name
        assert model["nll"] > 0 and model["length"] > 0
    assert summary["models"]["teacher"]["parameters"] > summary["models"]["sft"]["parameters"]
    models, best = summary["models"], {s: o.get("best") for s, o in summary["stages"].items()}
    # A stage that validation never liked better keeps the model it began with.
    assert (models["start"] != models["sft"]) == (best["student_sft"]["step"] > 0)
    assert (models["sft"] != models["minillm"]) == (best["distill"]["step"] > 0)
    stages = summary["stages"]
    assert list(stages) == ["teacher_answers", "student_sft", "distill", "evaluate"]
    assert all(stage["tokens"] > 0 for stage in stages.values())
    assert all(stage["seconds"] >= 0 for stage in stages.values())
    assert stages["student_sft"]["updates"] == stages["distill"]["updates"] == 4
    logged = sum(row.get("tokens", 0) for row in rows(workdir, "distill"))
    assert stages["distill"]["tokens"] == logged > 0
    assert [row["step"] for row in rows(workdir, "distill") if "loss" in row] == [1, 2, 3, 4]
    answers = (workdir / "evaluate" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 2 and set(json.loads(answers[0])["answers"]) == set(summary["models"])
    assert "<svg" in (workdir / "report.html").read_text()
    assert not list(workdir.rglob("*.part")) + list(workdir.rglob("*.tmp"))
    for file in [path for path in workdir.rglob("*") if path.is_file()]:
        assert b"secret of " not in file.read_bytes(), file


def test_a_run_is_evaluated_again_with_its_own_settings(finished, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    run, out = finished / "run", tmp_path / "out"
    words = [f"--model={run}", "--seeds=2", f"--output={out}"]
    assert command(monkeypatch, "evaluate", *words) == 0
    again = json.loads((out / "evaluate" / "figures.json").read_text())
    before = json.loads((run / "evaluate" / "figures.json").read_text())
    assert list(again) == ["teacher", "run"]
    # The first of the two seeds is that of the run; what is greedy or given is the same.
    assert again["run"]["nll"] == pytest.approx(before["minillm"]["nll"])
    assert again["run"]["greedy_rouge_l"] == before["minillm"]["greedy_rouge_l"]
    first = [
        json.loads(line) for line in (out / "evaluate" / "responses.jsonl").read_text().splitlines()
    ]
    first = [row["rouge_l"] for row in first if (row["model"], row["seed"]) == ("run", 0)]
    assert np.mean(first) == pytest.approx(before["minillm"]["rouge_l"])
    assert "reverse_kl_deviation" in again["run"]
    capsys.readouterr()
    assert command(monkeypatch, "evaluate", f"--model={run}", "--max_prompt=5") == 2
    assert "within 5 tokens" in capsys.readouterr().err


def test_the_student_on_disk_is_made_of_the_kept_layers(finished):
    student = hf.load(finished / "run" / "stages" / "distill" / "model")
    assert student.config.layers == student.hf_config["num_hidden_layers"] == 1


def test_a_second_start_reports_again_and_does_nothing_else(copy, capsys, monkeypatch):
    config, workdir = copy
    monkeypatch.setattr("minillm_jax.build.open_model", None)  # no weights are read
    skip = ("report", "summary.json", "report.html", "metrics.jsonl", "timing.jsonl")
    before = files_of(workdir, *skip)
    (workdir / "report.html").unlink()
    pipeline.execute(config, workdir)
    assert files_of(workdir, *skip) == before
    assert (workdir / "report.html").is_file()
    assert capsys.readouterr().err.count(": done, in ") == 4


def test_stages_run_alone_and_those_without_input_are_refused(copy, tmp_path):
    config, done = copy
    workdir = tmp_path / "alone"
    with pytest.raises(InputError, match="distill needs the output of student_sft: add it"):
        pipeline.execute(config, workdir, ["teacher_answers", "distill"])
    assert not workdir.exists()
    pipeline.execute(config, workdir, ["teacher_answers"])
    assert [p.name for p in (workdir / "stages").iterdir()] == ["teacher_answers"]
    same = "stages/teacher_answers/answers.jsonl"
    assert (workdir / same).read_bytes() == (done / same).read_bytes()
    with pytest.raises(InputError, match="no stage 'distil': choose from teacher_answers, stud"):
        pipeline.execute(config, workdir, ["distil"])


def test_stages_are_done_again_from_scratch_when_their_input_is_another(copy, monkeypatch):
    config, workdir = copy
    (workdir / "stages" / "teacher_answers" / "done.json").unlink()
    for stage in ("student_sft", "distill"):
        assert (workdir / "stages" / stage / "checkpoints").is_dir()
    restore, found = Checkpoints.restore, []

    def watched(*args, **kwargs):
        found.append(restore(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Checkpoints, "restore", watched)
    states = {s["stage"]: s["state"] for s in pipeline.describe(config, workdir)["stages"]}
    assert set(states.values()) == {"to do"}
    before = files_of(workdir / "stages")
    pipeline.execute(config, workdir)
    assert found == [None, None]  # the checkpoints were of other answers
    after = files_of(workdir / "stages")
    done = {p: t for p, t in after.items() if p.name == "done.json"}
    assert len(done) == 5 and all(before.get(p) != t for p, t in done.items())


def with_answers(folder, **changes):
    """The toy config with answers of the data, a teacher to tune, and a student of its own."""
    config = toy_config(folder)
    for split in ("train", "validation", "test"):
        file = folder / f"{split}.jsonl"
        rows = [
            json.loads(line) | {"output": ["red", "green"]}
            for line in file.read_text().splitlines()
        ]
        answered = folder / f"answered_{split}.jsonl"
        answered.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.data[split] = str(answered)
    config.answers.source = "data"
    student = folder / "student"
    if not student.exists():
        write_teacher(student, seed=1, num_hidden_layers=1)
    config.student.path = str(student)
    config.student.keep_layers = ()
    config.teacher_sft.steps, config.teacher_sft.batch_size = 3, 8
    config.teacher_sft.learning_rate, config.teacher_sft.keep = 1e-2, "loss"
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    return config


def losses(workdir, stage, name="loss"):
    return [row[name] for row in rows(workdir, stage) if name in row]


def test_later_stages_have_the_tuned_teacher_after_a_new_start_too(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = with_answers(tmp_path, method="kd", distill__kd_ratio=1.0, distill__keep="loss")
    workdir, opened = tmp_path / "run", []
    looked_at = hf.open_model
    monkeypatch.setattr(
        "minillm_jax.build.open_model", lambda path: (opened.append(Path(path)), looked_at(path))[1]
    )
    pipeline.execute(config, workdir, ["teacher_sft", "distill"])
    tuned, raw = workdir / "stages" / "teacher_sft" / "model", tmp_path / "teacher"
    assert losses(workdir, "teacher_sft")[-1] < losses(workdir, "teacher_sft")[0]
    assert losses(workdir, "teacher_sft", "valid_loss")[-1] < 4.0
    assert opened.index(raw) < opened.index(tuned) and opened.count(tuned) == 1
    first = losses(workdir, "distill")
    undo(workdir, "distill")
    opened.clear()
    pipeline.execute(config, workdir)
    assert raw not in opened and tuned in opened
    assert losses(workdir, "distill") == first
    figures = json.loads((workdir / "summary.json").read_text())["models"]
    assert set(figures) == {"teacher", "start", "kd"}
    assert figures["kd"]["nll"] < figures["start"]["nll"]
    lines = (workdir / "evaluate" / "answers.jsonl").read_text().splitlines()
    judged = [json.loads(line) for line in lines]
    assert [row["reference"] for row in judged] == ["red", "red"]


def test_a_student_made_of_the_teachers_layers_is_made_of_the_tuned_ones(tmp_path, monkeypatch):
    one_device(monkeypatch)
    build = pipeline.Builder(toy_config(tmp_path), tmp_path / "run")
    assert build.student_checkpoint.path == tmp_path / "teacher"
    tuned = write_teacher(tmp_path / "tuned", seed=2)
    build.follow(tuned)
    assert build.student_checkpoint.path == build.teacher_checkpoint.path == tuned
    assert build.student_checkpoint.config.layers == 1


def test_a_start_from_a_fine_tuned_student_is_that_of_the_stage(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = with_answers(tmp_path, teacher_sft__steps=0)
    pipeline.execute(config, tmp_path / "whole", ["student_sft", "distill"])
    given = with_answers(tmp_path, teacher_sft__steps=0)
    given.student.fine_tuned = str(tmp_path / "whole" / "stages" / "student_sft" / "model")
    pipeline.execute(given, tmp_path / "given", ["distill", "evaluate"])
    assert rows(tmp_path / "given", "distill") == rows(tmp_path / "whole", "distill")
    figures = json.loads((tmp_path / "given" / "evaluate" / "figures.json").read_text())
    assert set(figures) == {"teacher", "sft", "minillm"}


@pytest.mark.parametrize("method", ["minillm", "kd"])
def test_a_run_in_windows_is_the_run_in_all_slots(tmp_path, monkeypatch, method):
    """Rows are arranged, those of a collection and those with kept targets, too."""
    one_device(monkeypatch)
    config, arranged, spread = with_answers(tmp_path, teacher_sft__steps=0), [], training.spread
    config.method = method
    config.distill.cache_teacher = "states" if method == "kd" else ""
    config.sft.micro_batch = config.distill.micro_batch = 2
    stages = {"minillm": ["student_sft", "distill"], "kd": ["teacher_targets", "distill"]}[method]
    pipeline.execute(config, tmp_path / "slots", stages)
    monkeypatch.setattr(recipe, "NARROW", 4)
    monkeypatch.setattr(recipe, "ALIGNED", 4)
    assert pipeline.Builder(config, tmp_path).windows == (8, 12, 24)

    def watched(tokens, micro_batches):
        arranged.append(tokens.tolist())
        return spread(tokens, micro_batches)

    monkeypatch.setattr(training, "spread", watched)
    pipeline.execute(config, tmp_path / "windows", stages)
    trained = [stage for stage in stages if stage != "teacher_targets"]
    for stage in trained:
        found, expected = (rows(tmp_path / name, stage) for name in ("windows", "slots"))
        assert len(found) == len(expected) > 4
        for row, wanted in zip(found, expected, strict=True):
            assert row.pop("stage") == wanted.pop("stage")
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert len(arranged) == 4 * len(trained)
    assert len({int(np.searchsorted((8, 12), n)) for each in arranged for n in each}) > 1
    # What the student writes in an update depends on the place of the prompt.
    config.method, config.distill.cache_teacher = "gkd", ""
    assert training._arrange(pipeline.Builder(config, tmp_path), "distill") is None


def test_validation_and_test_rows_are_taken_out_of_one_source(tmp_path, monkeypatch):
    one_device(monkeypatch)
    monkeypatch.setitem(splits.SIZES, "validation", 3)
    monkeypatch.setitem(splits.SIZES, "test", 2)
    config = with_answers(tmp_path)
    config.data.validation = config.data.test = config.data.train
    config.evaluate.validation_prompts = 2
    data = pipeline.Builder(config, tmp_path / "run").data
    found = {split: [row.instruction for row in data.rows(split)] for split in dataset.SPLITS}
    assert found == {
        "test": list(PROMPTS[:2]),
        "validation": list(PROMPTS[2:4]),
        "train": list(PROMPTS[5:]),
    }
    said = pipeline.describe(config, tmp_path / "run")["geometry"]["prompts"]
    assert said["train"] == f"of {config.data.train}"


@pytest.mark.parametrize("stage", ["student_sft", "distill"])
def test_a_killed_run_goes_on_to_the_same_weights(copy, finished, monkeypatch, stage):
    config, workdir = copy
    undo(workdir, *{"student_sft": ["student_sft", "distill"], "distill": ["distill"]}[stage])
    (workdir / "metrics.jsonl").unlink()
    log = keeper.Keeper.log

    def killed(self, step, values, times):
        log(self, step, values, times)
        if step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "log", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pipeline.execute(config, workdir, [stage])
    folder = workdir / "stages" / stage
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["2"]
    assert not (folder / "done.json").exists()
    steps = []
    monkeypatch.setattr(
        keeper.Keeper, "log", lambda self, s, v, t: (steps.append(s), log(self, s, v, t))
    )
    pipeline.execute(config, workdir, [stage])
    assert steps == [3, 4]  # it went on, and did not begin again
    jax.tree.map(
        np.testing.assert_array_equal, weights(workdir, stage), weights(finished / "run", stage)
    )
    assert rows(workdir, stage) == rows(finished / "run", stage)
    mine, theirs = (pipeline.read_done(w, stage) or {} for w in (workdir, finished / "run"))
    for name in ("tokens", "updates", "best", "skipped"):
        assert mine[name] == theirs[name]


def test_another_config_is_refused_with_what_differs_but_tensorboard_is_free(copy):
    config, workdir = copy
    with config.unlocked():
        other = config.copy_and_resolve_references()
    other.distill.alpha, other.seed = 0.5, 3
    before = files_of(workdir)
    for call in (pipeline.execute, pipeline.describe):
        with pytest.raises(InputError, match=r"distill.alpha: 0.2 there, 0.5 now; seed: 0 there"):
            call(other, workdir)
    assert files_of(workdir) == before
    config.tensorboard = True
    undo(workdir, "teacher_answers", "student_sft")
    pipeline.execute(config, workdir, ["teacher_answers", "student_sft"])
    events = list((workdir / "tensorboard" / "student_sft").iterdir())
    assert events and b"valid_loss" in events[0].read_bytes()


def test_training_that_is_not_finite_stops_with_its_checkpoint_kept(copy, tmp_path):
    config, done = copy
    workdir = tmp_path / "nan"
    config.sft.learning_rate = 1e38
    config.sft.steps = 30
    config.sft.clip_norm = 1e30
    config.sft.weight_decay = 1e30
    with pytest.raises(InputError) as error:
        pipeline.execute(config, workdir, ["teacher_answers", "student_sft"])
    text = str(error.value)
    assert "\n" not in text and text.startswith("student_sft stopped: 10 updates in a row")
    last = workdir / "stages" / "student_sft" / "checkpoints"
    assert f"the last good checkpoint is {last}" in text
    assert list(last.iterdir())
    assert not (last.parent / "done.json").exists()
    hf.load(workdir / "stages" / "student_sft" / "model")  # the best one so far


def test_no_space_is_said_before_training_begins(copy, monkeypatch):
    config, workdir = copy
    undo(workdir, "distill")
    free = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    before = files_of(workdir, "metrics.jsonl")
    with pytest.raises(InputError, match=r"no space for distill in .*: it takes about 0 MB"):
        pipeline.execute(config, workdir, ["distill"])
    assert files_of(workdir, "metrics.jsonl") == before


def test_needed_space_is_that_of_two_models_and_the_checkpoints_in_flight(copy, monkeypatch):
    config, workdir = copy
    undo(workdir, "distill")
    parameters = json.loads((workdir / "summary.json").read_text())["models"]["sft"]["parameters"]
    need = 4 * parameters * (2 + 3)  # one checkpoint is written in four steps, saved every second

    def with_free(free):
        usage = namedtuple("usage", "total used free")(10**9, 0, free)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        run = pipeline.Run(pipeline.Builder(config), workdir, None)  # type: ignore[arg-type]
        pipeline.check_space(run, {"distill": "distill"})

    with_free(need)
    with pytest.raises(InputError, match="no space for distill"):
        with_free(need - 1)


def test_space_for_all_stages_is_looked_at_before_the_first_begins(copy, tmp_path, monkeypatch):
    config, done = copy
    held = sum(p.stat().st_size for p in (done / "stages").rglob("*") if p.is_file())
    usage = namedtuple("usage", "total used free")(10**9, 0, held // 8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space for student_sft and distill in"):
        pipeline.execute(config, tmp_path / "new")
    assert not (tmp_path / "new" / "stages").exists()


@pytest.fixture
def asked(monkeypatch):
    """Ask for a stop when a function is called the nth time; the request ends with the block."""

    @contextlib.contextmanager
    def at(place, name, number):
        call, calls = getattr(place, name), []

        def counted(*args, **options):
            calls.append(name)
            if len(calls) == number:
                stopping.ask()
            return call(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(stopping, "_asked", threading.Event())
            patch.setattr(place, name, counted)
            yield

    return at


def test_a_run_told_to_end_saves_in_every_stage_and_goes_on_to_the_same_bytes(
    finished, tmp_path, monkeypatch, asked
):
    one_device(monkeypatch)
    config, workdir = toy_config(finished), tmp_path / "run"
    points = (
        (answers, "answer", 2, "teacher_answers, 10 of 12 rows are kept in"),
        (keeper.Keeper, "evaluate", 1, "student_sft, before its first checkpoint"),
        (keeper.Keeper, "log", 3, "student_sft, saved after update 3 of 4"),
        (keeper.Keeper, "log", 1, "student_sft, saved after update 4 of 4"),  # yet to be judged
        (keeper.Keeper, "evaluate", 3, "distill, saved after update 2 of 4"),  # in the middle
        (keeper.Keeper, "evaluate", 2, "distill, saved after update 4 of 4"),
        (evaluation, "held_out", 2, "evaluate, 0 of "),  # the first model is judged
        (evaluation, "held_out", 3, "evaluate, 0 of "),  # and the first student
    )
    for place, name, number, says in points:
        with asked(place, name, number), pytest.raises(stopping.Stopped, match=says):
            pipeline.execute(config, workdir)
        assert not (workdir / "lock").exists()
    pipeline.execute(config, workdir)
    for file in ("metrics.jsonl", "evaluate/figures.json", "evaluate/answers.jsonl"):
        assert (workdir / file).read_bytes() == (finished / "run" / file).read_bytes(), file
    for stage in ("student_sft", "distill"):
        mine, theirs = (weights(at, stage) for at in (workdir, finished / "run"))
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_a_fork_goes_on_from_the_last_checkpoint_with_other_settings(copy, tmp_path, capsys):
    config, source = copy
    new = tmp_path / "new"
    with config.unlocked():
        other = config.copy_and_resolve_references()
    other.distill.learning_rate, other.name = 5e-4, "other"
    with pytest.raises(InputError, match=f"--fork={source} to go on from there"):
        pipeline.execute(other, source)
    before = files_of(source)
    pipeline.execute(other, new, ["distill"], source)
    said = capsys.readouterr().err
    assert f"forked {source} at update 2 of distill: " in said
    assert "distill.learning_rate 0.001 -> 0.0005, " in said
    assert files_of(source) == before
    made = json.loads((new / "fork.json").read_text())
    assert (made["stage"], made["step"]) == ("distill", 2)
    assert made["changed"]["name"] == {"was": "toy", "now": "other"}
    mine, theirs = rows(new, "distill"), rows(source, "distill")
    after = next(i for i, row in enumerate(mine) if row["step"] == 3)
    assert mine[:after] == theirs[:after] and mine[after] != theirs[after]
    assert rows(new, "student_sft") == rows(source, "student_sft")
    pipeline.execute(other, new, ["distill"], source)  # the same command again
    assert "distill: done" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds a run: give a new --workdir for a fork"):
        pipeline.execute(other, new, ["distill"], tmp_path / "another")


def test_a_batch_that_is_not_finite_is_kept_and_replayed(copy, tmp_path, monkeypatch, capsys):
    config, _ = copy
    workdir = tmp_path / "fresh"
    config.distill.steps, config.distill.save_every = 3, 1
    method, kept = assemble.policy_gradient, []

    def poisoned(build):
        found = method(build)

        def collect(*args):
            assert found.collect
            rollout = found.collect(*args)
            return rollout.replace(log_mix=rollout.log_mix.at[5, 0].set(np.nan))

        def update(state, frozen, batch):
            kept.append(batch)
            return found.update(state, frozen, batch)

        return found.__class__(update, collect)

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "policy_gradient", poisoned)
        pipeline.execute(config, workdir, ["teacher_answers", "student_sft", "distill"])
    (workdir / "stages" / "distill" / "checkpoints" / "unreadable-7").mkdir()
    pipeline.execute(config, workdir, ["report"])
    told = json.loads((workdir / "summary.json").read_text())["warnings"]
    assert [(one["stage"], one["step"]) for one in told] == [("distill", x) for x in (1, 1, 7)]
    assert "few tokens carry the importance weights" in told[0]["text"]
    assert told[1]["text"].startswith("updates 1 to 3: they were skipped")
    assert "distill/checkpoints/unreadable-7: this checkpoint was damaged" in told[2]["text"]
    assert told[0]["text"] in (workdir / "report.html").read_text()
    files = [workdir / "stages" / "distill" / "skipped" / f"{step}.npz" for step in (1, 2, 3)]
    said = capsys.readouterr().err
    assert "distill: update 2 is skipped, its loss or gradient is not" in said
    assert f"--replay={files[1]} says" in said
    assert (pipeline.read_done(workdir, "distill") or {})["skipped"] == 3
    for file, batch in zip(files, kept, strict=True):
        as_kept = jax.tree.map(np.asarray, batch)
        jax.tree.map(np.testing.assert_array_equal, read_batch(file), as_kept)
    before = files_of(workdir)
    replay.execute(config, workdir, files[1])
    said = capsys.readouterr().out
    (row,) = np.isnan(np.asarray(kept[1].log_mix[:, 0])).nonzero()[0]
    assert "update 2 of distill again, with the parameters after update 1" in said
    assert f"batch: 1 of 4 not finite\n  log_mix: 1 of 64, the first at [{row}, 0]" in said
    # The models' numbers are sound; what is made of log p~ is not, nor what follows from it.
    tokens = said[said.index("tokens:") : said.index("loss:")]
    assert "  w: 1 of 64" in tokens and "reward" not in tokens and "log_q" not in tokens
    assert "  policy_loss: not finite" in said and "  single_step_loss" in said
    assert "  embed.tokens: " in said and said.endswith("wrote them\n")
    assert files_of(workdir) == before
    # The same with a sound batch: what comes back are gradients, and no update is made.
    sound = read_batch(files[1])
    np.savez(files[1], **by_name(sound.replace(log_mix=np.nan_to_num(sound.log_mix))))
    replay.execute(config, workdir, files[1])
    said = capsys.readouterr().out
    assert said.count(": 0 of ") == 4 and "all is finite" in said
    with pytest.raises(InputError, match="no batch .*choose from .*1.npz, .*3.npz"):
        replay.execute(config, workdir, files[1].with_name("9.npz"))


def test_out_of_memory_says_what_the_plan_needs_and_what_to_set(copy, monkeypatch):
    config, workdir = copy
    undo(workdir, "distill")

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(training.trainer, "fit", full)
        patch.setitem(pipeline.memory.PROGRAMS, "distill", ("distill update",))
        with pytest.raises(InputError) as error:
            pipeline.execute(config, workdir, ["distill"])
    said = str(error.value)
    assert "\n" not in said and said.startswith(
        "distill: out of memory on cpu: distill update needs 0.0 GiB of"
    )
    assert "try --config.distill.remat=full" in said
    assert said.endswith("then the same command goes on")


def test_a_dry_run_describes_and_touches_nothing(copy, tmp_path, monkeypatch):
    config, workdir = copy
    monkeypatch.setattr("minillm_jax.build.open_model", None)  # no weights are read
    before = files_of(workdir)
    found = json.loads(json.dumps(pipeline.describe(config, workdir)))
    assert {s["state"] for s in found["stages"]} == {"done"}
    new = pipeline.describe(config, tmp_path / "new", ["evaluate", "distill"])
    assert new["stages"] == [
        {"stage": "distill", "state": "to do"},
        {"stage": "evaluate", "state": "to do"},
    ]
    assert found["config"]["student"]["keep_layers"] == [0]
    assert found["config"]["distill"]["length_norm"] is True  # of the estimator's preset
    assert found["config"]["distill"]["cliprange"] == 0.2
    assert found["geometry"]["prompts"] == {"train": 8, "validation": 2, "test": 2}
    assert found["geometry"]["distill"] == {
        "rollouts": 8, "batch": 8, "micro_batches": 1, "inner_epochs": 3,
        "updates_per_collection": 3, "collections": 2, "updates": 4,
    }  # fmt: skip
    assert found["devices"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert files_of(workdir) == before and not (tmp_path / "new").exists()


def test_the_student_begins_at_the_temperature_that_is_asked_for(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config, workdir, seen = toy_config(tmp_path), tmp_path / "run", []
    config.distill.start_temperature = 0.5
    pipeline.execute(config, workdir, ["teacher_answers", "student_sft"])
    validation = training.validation

    def watched(run, model, wanted, *source):
        seen.append(np.asarray(model.params["final_norm"]["scale"]))
        return validation(run, model, wanted, *source)

    monkeypatch.setattr(training, "validation", watched)
    pipeline.execute(config, workdir, ["distill"])
    sft = load_file(workdir / "stages" / "student_sft" / "model" / "model.safetensors")
    np.testing.assert_allclose(seen[0], 2 * sft["model.norm.weight"], rtol=1e-6)
    assert np.abs(seen[-1] - seen[0]).max() > 0  # and learns from there
