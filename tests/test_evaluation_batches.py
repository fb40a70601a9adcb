"""Batches of evaluation on several devices: their rows are split, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest

from minillm_jax.build import Builder
from minillm_jax.reporting.writers import MetricsWriter, read_rows, write_rows
from minillm_jax.rollout import Warp, Written
from minillm_jax.stages import Run, answers, measures
from minillm_jax.types import Sequences
from tests.toy_run import one_device, toy_config

GREEDY = Warp(temperature=0.0)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Three greedy answers and the divergences on them, by the number of devices."""

    def judge(devices):
        one_device(monkeypatch, devices)
        seen = set()
        for module, name in ((answers, "generate_shrinking"), (measures.divergence, "sums")):
            call = getattr(module, name)

            def spy(*args, call=call, **options):
                batch = args[2] if call is generate else args[4].response
                seen.add(tuple(part.data.shape for part in batch.addressable_shards))
                return call(*args, **options)

            monkeypatch.setattr(module, name, spy)
        with MetricsWriter(tmp_path) as metrics:
            run = Run(Builder(toy_config(tmp_path)), tmp_path, metrics)
            student = run.build.student()
            batches = list(
                answers.respond(run, student, run.build.data.prompts("train")[:3], GREEDY, 0)
            )
            found = measures.measure(run, student, batches)
        monkeypatch.undo()
        return answers.texts_of(run, batches), found, seen

    generate = answers.generate_shrinking
    return judge


def test_rows_are_split_over_the_devices_and_padded_up_to_them(judged):
    texts, figures, whole = judged(1)
    assert whole == {((3, 16),), ((3, 8),)}
    for devices in (2, 4):
        again, found, shapes = judged(devices)
        each = 4 // devices
        assert shapes == {((each, 16),) * devices, ((each, 8),) * devices}
        assert again == texts and len(found["tokens"]) == 3
        for name, value in figures.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
    """A run with a batch of two answers at a time, and what `divergence.sums` was given in it."""
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.evaluate.batch_size = 2
    seen, sums = [], measures.divergence.sums

    def spy(*args):
        seen.append(args[4])
        return sums(*args)

    monkeypatch.setattr(measures.divergence, "sums", spy)
    with MetricsWriter(tmp_path) as metrics:
        yield Run(Builder(config), tmp_path, metrics), seen


@pytest.mark.parametrize("k", [0, 3])
def test_answers_with_their_states_are_not_read_again_by_their_model(toy_run, k):
    run, seen = toy_run
    student, asked = run.build.student(), run.build.data.prompts("train")[:3]
    measure = measures.measuring(run, student, k)
    found = answers.sample(run, student, asked, 0, greedy=True, measure=measure)
    assert [type(batch) for batch in seen] == [Written, Written]
    assert [batch.hidden.shape for batch in seen] == [(2, 8, 32)] * 2
    read = measures.measure(run, student, found.sampled, k)
    assert [type(batch) for batch in seen[2:]] == [Sequences, Sequences]
    assert found.measured and found.measured.keys() == read.keys()
    assert float(read["reverse_kl"].min()) > 0.01
    for name, value in read.items():
        np.testing.assert_allclose(found.measured[name], value, rtol=1e-5, atol=1e-5)
    turned = replace(seen[0], hidden=seen[0].hidden[::-1])
    wrong = measure(turned, 2)["reverse_kl"]
    assert abs(wrong - read["reverse_kl"][:2]).max() > 0.01  # the states are what is used


def test_figures_of_answers_are_kept_with_them(toy_run, tmp_path):
    run, seen = toy_run
    student, asked = run.build.student(), run.build.data.prompts("train")[:3]
    options = {"measure": measures.measuring(run, student), "file": tmp_path / "answers.jsonl"}
    found = answers.sample(run, student, asked, 0, **options)
    again = answers.sample(run, student, asked, 0, **options)
    assert len(seen) == 2 and found.measured and again.measured
    for name, value in found.measured.items():
        np.testing.assert_array_equal(again.measured[name], value)
    rows = read_rows(options["file"])
    write_rows(options["file"], ({"ids": row["ids"]} for row in rows))  # of an earlier version
    older = answers.sample(run, student, asked, 0, **options)
    assert len(seen) == 4 and older.measured
    np.testing.assert_allclose(older.measured["log_ratio"], found.measured["log_ratio"], atol=1e-5)


def test_states_are_not_kept_where_they_are_another_matter(toy_run, monkeypatch):
    run, seen = toy_run
    student, asked = run.build.student(), run.build.data.prompts("train")[:3]
    for name, value in (("ragged", False), ("arithmetic", lambda build, model: "bfloat16")):
        with monkeypatch.context() as patch:
            patch.setattr(type(run.build), name, value)
            answers.sample(run, student, asked, 0, measure=measures.measuring(run, student))
    assert [type(batch) for batch in seen] == [Sequences] * 4


def test_the_teacher_answers_so_many_prompts_at_a_time(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.answers.batch_size = 3
    generate, sizes = answers.generate_shrinking, []

    def spy(config, params, prompt, *args, **options):
        sizes.append(len(prompt))
        return generate(config, params, prompt, *args, **options)

    monkeypatch.setattr(answers, "generate_shrinking", spy)
    with MetricsWriter(tmp_path) as metrics:
        answers.teacher_answers(Run(Builder(config), tmp_path, metrics))
    assert sizes == [3, 3, 3, 2, 2]  # 8, 2 and 2 prompts
