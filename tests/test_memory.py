"""What is said when the memory is used up; `test_pipeline` has the stage that trains."""

import jax
import pytest

from minillm_jax import memory
from tests.toy_run import toy_config


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: gone"), False),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_it):
    assert memory.exhausted(error) is is_it


def test_stages_that_only_read_are_told_of_their_batches(tmp_path):
    config = toy_config(tmp_path)
    said = memory.explain(config, tmp_path, "evaluate")
    assert said.startswith("evaluate: out of memory on cpu: lower --config.evaluate.batch_size=8; ")
    assert "--config.answers.batch_size=8" in memory.explain(config, tmp_path, "teacher_answers")


def test_a_plan_that_fails_does_not_hide_the_memory(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(memory.verdict, "plan", broken)
    said = memory.explain(toy_config(tmp_path), tmp_path, "distill")
    assert said.startswith("distill: out of memory on cpu: ") and "ZeroDivisionError" in said
