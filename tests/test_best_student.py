"""Which student a training stage keeps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from minillm_jax.stages import keeper

STATE = SimpleNamespace(params={})


@pytest.mark.parametrize(
    "score, values, kept",
    [
        ("loss", [3.0, 2.0, 2.5], [0, 1]),
        ("loss", [math.nan, 2.0, math.nan, 1.0], [0, 1, 3]),
        ("reverse_kl", [2.0, math.nan], [0]),
        ("rouge_l", [0.2, 0.1, 0.3, math.nan, 0.25], [0, 2]),
        ("rouge_l", [math.nan, 0.1, 0.05], [0, 1]),
    ],
)
def test_the_best_score_is_kept_and_nan_never_beats_a_number(monkeypatch, score, values, kept):
    stage, saved = staged(monkeypatch, score, score, [{score: value} for value in values])
    for step in range(len(values)):
        stage.evaluate(step, STATE)
    assert saved == kept
    assert stage.best and stage.best["step"] == kept[-1]


def test_equal_scores_are_decided_by_the_loss_and_rouge_of_0_is_warned_of(monkeypatch):
    losses = [math.nan, 2.0, 2.5, math.nan, 1.0]
    values = [{"rouge_l": 0.0, "loss": loss} for loss in losses] + [{"rouge_l": 0.1, "loss": 4.0}]
    stage, saved = staged(monkeypatch, "rouge_l", "loss", values)
    stage.bar = bar = Bar()
    for step in range(len(values)):
        stage.evaluate(step, STATE)
    assert saved == [0, 1, 4, 5]
    assert stage.best == {"step": 5, "valid_rouge_l": 0.1, "valid_loss": 4.0}
    assert stage.warnings == len(bar.said) == 1
    assert "no answer has a word of its reference" in bar.said[0]
    assert (
        bar.said[0].startswith("warning: s, update 0: ") and "config.sft.keep=loss" in bar.said[0]
    )


def test_a_stage_of_an_older_version_keeps_its_best_where_scores_are_equal(monkeypatch):
    stage, saved = staged(monkeypatch, "rouge_l", "loss", [{"rouge_l": 0.1, "loss": 1.0}])
    stage.best = {"step": 3, "valid_rouge_l": 0.1}
    stage.evaluate(4, STATE)
    assert not saved and stage.best["step"] == 3


class Bar:
    """A progress bar that remembers what it is told."""

    def __init__(self):
        self.said: list[str] = []
        self.log: Any = self.said.append


def staged(monkeypatch, keep, headline, scores):
    """A stage that validates to `scores`, one after another, and the steps that it keeps."""
    saved, left = [], iter(enumerate(scores))
    now = []

    def validate(_):
        step, found = next(left)
        now[:] = [step]
        return found

    monkeypatch.setattr(keeper.modelfiles, "save_model", lambda *_: saved.append(now[0]))
    quiet: Any = SimpleNamespace(
        metrics=SimpleNamespace(write=lambda *_: None),
        model=lambda stage: stage,
        build=SimpleNamespace(tokenizer=None),
    )
    start: Any = SimpleNamespace(config=None, hf_config={})
    stage: Any = keeper.Keeper(quiet, "s", start, validate, f"valid_{keep}", headline, None, "sft")
    return stage, saved
