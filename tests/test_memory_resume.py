"""A run that is cut goes on with what its method remembers: the same numbers, bit for bit."""

import json
import shutil

import pytest

from minillm_jax import pipeline
from minillm_jax.checkpoint import Checkpoints
from tests.toy_run import one_device, toy_config


class Killed(Exception):
    pass


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "distill"]
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def test_distillm_goes_on_with_its_buffer_and_threshold(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.method, config.distill.keep = "distillm", "loss"
    config.distill.steps, config.distill.on_policy, config.distill.replay = 5, 0.9, 16
    first, straight, cut = ["teacher_answers", "student_sft"], tmp_path / "one", tmp_path / "two"
    pipeline.execute(config, straight, first)
    shutil.copytree(straight, cut)
    pipeline.execute(config, straight, ["distill"])
    save = Checkpoints.save

    def save_and_die(self, step, *args, **options):
        save(self, step, *args, **options)
        self.wait()
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        pipeline.execute(config, cut, ["distill"])
    monkeypatch.setattr(Checkpoints, "save", save)
    assert len(logged(cut)) < len(logged(straight))
    pipeline.execute(config, cut, ["distill"])
    assert logged(cut) == logged(straight)
    rows = [row for row in logged(straight) if "on_policy" in row]
    assert any(row["on_policy"] for row in rows[2:])  # of what was kept, or written after the cut
    assert rows[-1]["threshold"] >= rows[0]["threshold"] > 0
