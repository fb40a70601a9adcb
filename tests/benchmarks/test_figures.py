"""Every benchmark runs on small sizes, and its figures are what the sizes say."""

import argparse
import sys

import jax
import pytest

from benchmarks import loss, pair, rollout, step
from minillm_jax.reporting.writers import read_json
from tests.toy_models import toy

SIZES = ("--prompt=4", "--slots=8", "--repeats=1")


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Run a benchmark with options, on a toy pair, and return the JSON that it writes."""
    teacher, student = toy(0, vocab=40), toy(1, vocab=40)

    def load(asked: argparse.Namespace) -> pair.Pair:
        return pair.Pair(*teacher, *student, vocab=40)

    def run(module, *options: str) -> dict:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, f"--json={path}", *options])
        monkeypatch.setattr(pair, "load", load)
        module.main()
        return read_json(path)

    return run


def test_loss(figures, capsys):
    sizes = ("--vocab=300,700", "--tokens=64", "--width=16", "--teacher_width=24", "--repeats=1")
    found = figures(loss, *sizes)
    assert [(case["loss"], case["vocab"]) for case in found["cases"]] == [
        (name, size) for name in loss.LOSSES for size in (300, 700)
    ]
    for case in found["cases"]:
        assert case["difference"] < 1e-5 and case["blocks"]["seconds"] > 0
    assert found["cases"][2]["flops"] == 2 * 64 * 300 * (3 * 16 + 24)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found["cases"])


def test_rollout(figures, capsys):
    found = figures(rollout, *SIZES, "--rows=1,2", "--batch=2", "--longest=99")
    assert [one["rows"] for one in found["steps"]] == [1, 2]
    # On made-up rates: 2 rows are bound by bytes where memory is slow, by products where it is not.
    config, params = toy(0, vocab=40)
    asked = argparse.Namespace(dtype="float32", prompt=4, slots=8)
    slow = rollout.step_bound(config, params, 2, asked, 1e30, 1.0)
    cache = 2 * 2 * 2 * 2 * 9 * 4 * 4  # k and v, layers, rows, kv heads, slots, width, bytes
    assert slow == sum(x.nbytes for x in jax.tree.leaves(params)) + cache
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
    attention = 2 * 2 * 2 * 4 * 9 * 4  # scores and sums, layers, rows, heads, slots, width
    assert rollout.step_bound(config, params, 2, asked, 1.0, 1e30) == 2 * (2 * matrices + attention)
    assert found["collection"]["against_reference"] > 0
    early = found["early"]
    assert early["tokens"] == 22 + 96 and early["ratio"] == early["fixed"] / early["shrinking"] > 0
    assert "the reference's schedule" in capsys.readouterr().out


def test_step(figures):
    found = figures(step, *SIZES, "--batch=2")
    assert [one["update"] for one in found["updates"]] == ["sft", "minillm"]
    first, second = found["updates"]
    assert second["flops"] - first["flops"] == 2 * 2 * 8 * 16 * 40  # the teacher's head
    assert first["tokens_per_s"] == pytest.approx(2 * 12 / first["seconds"])


def test_models_of_the_hub_are_made_up_in_their_sizes(monkeypatch):
    """Sizes as published; the teacher in the dtype asked for, the student in float32."""
    names = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-1.5B"
    parser = argparse.ArgumentParser()
    pair.add_options(parser)
    asked = parser.parse_args([f"--random={','.join(names)}", "--dtype=bfloat16"])
    made = []

    def small(config, key, dtype):
        made.append((config.layers, config.width, str(dtype)))
        return {}

    monkeypatch.setattr(pair, "init_params", small)
    monkeypatch.setattr(pair, "_homes", lambda config: (None, None))
    found = pair.load(asked)
    assert made == [(28, 3584, "bfloat16"), (28, 1536, "float32")]
    assert found.vocab == 151936 and found.teacher.vocab_size == 152064
