"""A method on kept targets learns what it learns with the teacher beside it."""

import json
import re

import numpy as np
import pytest

from minillm_jax import pipeline
from minillm_jax.rollout import score
from tests.toy_run import one_device, toy_config


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"] == "distill" and "loss" in row]


def test_kept_targets_teach_the_same(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.method, config.distill.keep, config.answers.batch_size = "akl", "loss", 3
    pipeline.execute(config, tmp_path / "beside", ["teacher_answers", "distill"])

    config.distill.cache_teacher = "states"
    read, layers = [], score.hidden_states

    def recorded(model, *args, **options):
        read.append(model.layers)
        return layers(model, *args, **options)

    monkeypatch.setattr(score, "hidden_states", recorded)
    workdir = tmp_path / "kept"
    pipeline.execute(config, workdir, ["teacher_answers", "teacher_targets"])
    folder = workdir / "stages" / "teacher_targets"
    assert len(list((folder / "states").glob("*.npy"))) == 3  # of 8 rows
    tokens = json.loads((folder / "done.json").read_text())["tokens"]
    answers = workdir / "stages" / "teacher_answers" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert tokens == sum(len(row["tokens"]) for row in rows if row["split"] == "train")
    monkeypatch.setattr("minillm_jax.stages.training.self_test", lambda run, examples: {})
    read.clear()
    pipeline.execute(config, workdir, ["distill"])
    assert set(read) == {1}  # the student's one layer, never the teacher's two
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "beside"), rtol=2e-5)

    # All ids of the vocabulary are the same teacher; fewer are another one.
    config.distill.cache_teacher, workdir = "top1000", tmp_path / "cut"
    pipeline.execute(config, workdir, ["teacher_answers", "teacher_targets"])
    read.clear()
    pipeline.execute(config, workdir, ["distill"])
    assert set(read) == {1}
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "beside"), rtol=2e-5)
    config.distill.cache_teacher, workdir = "top3", tmp_path / "cut to 3"
    pipeline.execute(config, workdir, ["teacher_answers", "teacher_targets"])
    kept = np.load(workdir / "stages" / "teacher_targets" / "states" / "00000.npy")
    assert kept["ids"].shape[1:] == (3,) and kept["log_p"].shape[1:] == (4,)
    np.testing.assert_allclose(np.exp(kept["log_p"]).sum(axis=1), 1, rtol=1e-5)
    assert (kept["log_p"][:, :2] >= kept["log_p"][:, 1:3]).all()


@pytest.mark.parametrize("cached", ["states", "top3", ""])
def test_a_fork_goes_on_with_the_kept_targets_and_without(cached, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    config, source = toy_config(tmp_path), tmp_path / "source"
    config.method, config.distill.keep, config.distill.cache_teacher = "kd", "loss", "states"
    config.distill.evaluate_every = 100
    stages = ["teacher_answers", "teacher_targets", "distill"]
    pipeline.execute(config, source, stages)
    with config.unlocked():
        other = config.copy_and_resolve_references()
    other.distill.learning_rate, other.distill.cache_teacher = 5e-3, cached
    stages = stages if cached else ["teacher_answers", "distill"]
    pipeline.execute(other, tmp_path / "fork", stages, source)
    said = capsys.readouterr().err
    at = re.search(r"forked .* at update (\d+) of distill", said)
    assert at and 0 < int(at[1]) < other.distill.steps
    kept = [
        (tmp_path / run / "stages/teacher_targets/states").glob("*.npy")
        for run in ("source", "fork")
    ]
    old, new = ({file.name: file.read_bytes() for file in files} for files in kept)
    assert old and (old == new) == (cached == "states") and bool(new) == bool(cached)
    assert "distill: kept the model of update " in said
    before, after = losses(source), losses(tmp_path / "fork")
    same = [mine == theirs for mine, theirs in zip(after, before, strict=True)]
    # The first update after the fork begins where the other one did; by other targets or not.
    first = int(at[1]) + (cached != "top3")
    assert all(same[:first]) and not any(same[first:])
