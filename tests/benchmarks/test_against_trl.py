"""Two programs that step in turn, one of which is TRL in another environment; here it is a fake."""

import argparse
import sys
from typing import Any

import pytest

from benchmarks import against_trl, pair
from minillm_jax import scratch
from minillm_jax.models import DecoderConfig
from minillm_jax.reporting.writers import read_json

FAKE = """#!/bin/sh
[ "$1" = -c ] || exec {python} -c '
import json, pathlib, sys
from benchmarks.stepwise import Asked
given = json.loads(pathlib.Path(sys.argv[1], "steps.json").read_text())
asked = Asked()
print("what a library prints is no answer")
asked.answer(prompts=given["prompts"])
for _ in asked:
    asked.answer()
' "$3"
"""


@pytest.fixture
def trl_python(tmp_path):
    """An interpreter that has trl, as far as one can see from here."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_steps_in_turn(trl_python, tmp_path, monkeypatch, capsys):
    model = scratch.model("scratch:llama-2x32", tmp_path)
    figures = tmp_path / "figures.json"
    words = (f"--model={model}", "--layers=0", "--prompt=5", "--slots=8", "--batch=2")
    more = ("--repeats=2", f"--trl_python={trl_python}", f"--json={figures}")
    monkeypatch.setattr(sys, "argv", ["against_trl", *words, *more])
    against_trl.main()
    found = read_json(figures)
    ours, trl = found["ours"], found["trl"]
    assert len(ours["seconds"]) == len(trl["seconds"]) == 2
    # Ours is a step of training: it takes longer than an answer, and reports what it learns from.
    assert found["time_ratio"] > 1 and ours["reverse_kl"] > 0
    assert 0 < ours["collect_seconds"] < ours["seconds"][-1]
    assert ours["peak_bytes"] > trl["peak_bytes"] > 2**20
    assert len(trl["prompts"]) == 2 and len(set(trl["prompts"])) == 2
    assert f"time {found['time_ratio']:.2f}, memory" in capsys.readouterr().out


def test_floor():
    sizes: Any = {"layers": 2, "width": 16, "mlp_width": 32, "max_positions": 64, "gated": True}
    student = DecoderConfig(vocab_size=40, heads=4, kv_heads=2, **sizes)
    teacher = DecoderConfig(vocab_size=40, heads=4, kv_heads=2, **sizes | {"layers": 4})
    asked = argparse.Namespace(batch=2, prompt=4, slots=8)
    kernels, head = 2 * (3 * 16 * 32 + 2 * 16 * 16 + 2 * 16 * 8), 40 * 16
    assert (pair.kernels(student), pair.kernels(teacher)) == (kernels, 2 * kernels)
    by_work = against_trl.floor(student, teacher, asked, 1.0, 1e30)
    scores = 2 * 2 * 4 * 4  # q k and w v, layers, heads, their width: per token and token seen
    assert by_work["prompts"] == 3 * 2 * 2 * 4 * (kernels + scores * 4 / 2)
    seen = 12 * 12 / 2 - 4 * 4 / 2  # of each row, by its response
    written = 2 * 2 * (8 * kernels + scores * seen)
    assert by_work["student"] == written + 2 * 16 * head
    assert by_work["teacher"] == 2 * written + 2 * 16 * head
    assert by_work["update"] == 3 * (2 * 2 * 12 * (kernels + scores * 6) + 2 * 16 * head) + (
        2 * 16 * head
    )
    by_bytes = against_trl.floor(student, teacher, asked, 1e30, 1.0)
    cache = 2 * 2 * 2 * 8 * 2 * 4  # k and v, layers, rows, mean slots, key-value heads, width
    assert by_bytes["student"] == 8 * 4 * (kernels + head + cache)
    assert by_bytes["optimizer"] == 7 * 4 * (kernels + head)


@pytest.mark.parametrize("python", [sys.executable, "no/such/python"])
def test_without_trl_it_says_what_to_install(python, monkeypatch, capsys):
    monkeypatch.setattr(against_trl.models, "opened", lambda asked: pytest.fail("it went on"))
    if against_trl.has_trl(python):
        pytest.skip("trl is here")
    monkeypatch.setattr(sys, "argv", ["against_trl", f"--trl_python={python}"])
    with pytest.raises(SystemExit) as error:
        against_trl.main()
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1 and "trl==1.16.0" in said
