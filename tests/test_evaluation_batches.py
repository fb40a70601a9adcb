"""Batches of evaluation on several devices: their rows are split, and nothing else changes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minillm_jax.build import Builder
from minillm_jax.reporting.writers import MetricsWriter
from minillm_jax.rollout import Warp, Written
from minillm_jax.stages import Run, answers, measures
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


def test_answers_with_their_states_are_not_read_again_by_their_model(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.evaluate.batch_size = 2
    with MetricsWriter(tmp_path) as metrics:
        run = Run(Builder(config), tmp_path, metrics)
        student, asked = run.build.student(), run.build.data.prompts("train")[:3]
        options = {"file": tmp_path / "answers.jsonl", "with_states": True}
        written, greedy = answers.respond_twice(run, student, asked, 0, **options)
        assert all(isinstance(batch, Written) for batch, _ in written)
        assert not any(isinstance(batch, Written) for batch, _ in greedy)
        kept, _ = answers.respond_twice(run, student, asked, 0, **options)
        assert not any(isinstance(batch, Written) for batch, _ in kept)
        found, read = (measures.measure(run, student, batches) for batches in (written, kept))
        assert float(read["reverse_kl"].min()) > 0.01
        for name, value in read.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
        batches: list[Any] = [batch for batch, _ in written]
        assert [batch.hidden.shape for batch in batches] == [(2, 8, 32)] * 2
        other = replace(batches[0], hidden=batches[0].hidden[::-1])
        wrong = measures.measure(run, student, [(other, 2)])["reverse_kl"]
        assert abs(wrong - read["reverse_kl"][:2]).max() > 0.01  # the states are what is used


def test_states_are_not_kept_on_several_devices(tmp_path, monkeypatch):
    one_device(monkeypatch, 2)
    with MetricsWriter(tmp_path) as metrics:
        run = Run(Builder(toy_config(tmp_path)), tmp_path, metrics)
        student, asked = run.build.student(), run.build.data.prompts("train")[:3]
        found = answers.respond(run, student, asked, GREEDY, 0, with_states=True)
        assert not any(isinstance(batch, Written) for batch, _ in found)


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
