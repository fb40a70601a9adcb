"""Which student a training stage keeps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from minillm_jax.stages import training


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
    saved = []
    monkeypatch.setattr(training.modelfiles, "save_model", lambda *_: saved.append(step))
    quiet: Any = SimpleNamespace(
        metrics=SimpleNamespace(write=lambda *_: None),
        model=lambda stage: stage,
        build=SimpleNamespace(tokenizer=None),
    )
    start: Any = SimpleNamespace(config=None, hf_config={})
    state = SimpleNamespace(params={})
    left = iter(values)
    stage = training._Stage(
        quiet, "s", start, lambda _: {score: next(left)}, f"valid_{score}", None, "sft"
    )
    for step in range(len(values)):
        stage.evaluate(step, state)
    assert saved == kept
    assert stage.best and stage.best["step"] == kept[-1]
