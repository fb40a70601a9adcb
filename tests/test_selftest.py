"""Before it teaches, the teacher is asked whether it agrees with itself."""

import json

import jax
import numpy as np
import pytest

from minillm_jax import pipeline
from minillm_jax.build import Builder
from minillm_jax.evaluation import divergence
from minillm_jax.reporting.writers import MetricsWriter
from minillm_jax.stages import Run
from minillm_jax.stages.selftest import self_test
from minillm_jax.types import InputError
from tests.toy_run import one_device, toy_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    with MetricsWriter(tmp_path / "run") as metrics:
        yield Run(Builder(config, tmp_path), tmp_path / "run", metrics)


def answers(run):
    prompts = run.build.data.prompts("train")
    return [prompt.__class__(prompt.prompt, (5, 6, 7, 1), prompt.row) for prompt in prompts]


def test_a_teacher_that_differs_from_itself_is_refused(run, monkeypatch, capsys):
    found = self_test(run, answers(run))["self_test"]
    assert 0 <= found["noise"] < 1e-4 and 0 <= found["teacher_to_teacher"] < 1e-4
    assert "self-test: KL[teacher || teacher]" in capsys.readouterr().err
    exact, asked = divergence.sums, []

    def wrong(*args, **options):
        asked.append(args[4])
        rows = exact(*args, **options)
        return rows | {"reverse_kl": rows["reverse_kl"] + 0.01 * rows["tokens"]}

    monkeypatch.setattr(divergence, "sums", wrong)
    with pytest.raises(InputError, match="is 0.01 nats per token from itself, with a noise of"):
        self_test(run, answers(run))
    np.testing.assert_array_equal(asked[0].prompt, asked[1].prompt[::-1])


def test_a_teacher_that_is_not_finite_is_refused(run):
    broken = jax.tree.map(lambda x: x * np.nan, run.build.teacher.params)
    object.__setattr__(run.build.teacher, "params", broken)
    with pytest.raises(InputError, match="gives numbers that are not finite: try"):
        self_test(run, answers(run))


def test_it_runs_before_the_first_update_and_is_recorded(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config, workdir = toy_config(tmp_path), tmp_path / "run"
    config.method, config.distill.keep = "taid", "loss"
    pipeline.execute(config, workdir, ["teacher_answers", "distill"])
    done = json.loads((workdir / "stages" / "distill" / "done.json").read_text())
    assert set(done["self_test"]) == {"noise", "teacher_to_teacher"}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    moved = [row["t"] for row in rows if "t" in row]
    assert moved[0] == pytest.approx(0.4) and moved == sorted(moved) and moved[-1] > 0.65
