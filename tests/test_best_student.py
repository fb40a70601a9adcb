"""Which student a training stage keeps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from minillm_jax.stages import training


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([3.0, 2.0, 2.5], [0, 1]),
        ([math.nan, 2.0, math.nan, 1.0], [0, 1, 3]),
        ([2.0, math.nan], [0]),
    ],
)
def test_the_lowest_score_is_kept_and_nan_never_beats_a_number(monkeypatch, scores, kept):
    saved = []
    monkeypatch.setattr(training.modelfiles, "save_model", lambda *_: saved.append(step))
    quiet: Any = SimpleNamespace(
        metrics=SimpleNamespace(write=lambda *_: None),
        model=lambda stage: stage,
        build=SimpleNamespace(tokenizer=None),
    )
    start: Any = SimpleNamespace(config=None, hf_config={})
    state = SimpleNamespace(params={})
    left = iter(scores)
    stage = training._Stage(quiet, "s", start, None, lambda _: next(left), "score", None)
    for step in range(len(scores)):
        stage.evaluate(step, state)
    assert saved == kept
    assert stage.best and stage.best["step"] == kept[-1]
