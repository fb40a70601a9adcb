"""One on-policy distillation step of this package against one of TRL, in turn, on one machine.

    python -m benchmarks.against_trl --trl_python trl/bin/python --json against_trl.json

Ours: a collection with teacher-mixed sampling at alpha = 0.2 and one update with the full MiniLLM
loss. TRL's: its `DistillationTrainer` with beta = 1, the reverse KL on the student's own answers;
MiniLLM itself is no longer in TRL. The same teacher, the same student made of some of its layers,
the same prompts, float32, AdamW behind a clip of the gradient, no response that ends early. Each
runs in a process of its own that reads the models from a Hugging Face folder, and is asked for a
step while the other one rests. Peak memory is "VmHWM" of the process, loading included.

The floor is what our step takes at least on this machine: each phase the larger of its FLOPs over
the matmul rate and its bytes over the bandwidth, the best that were measured between the turns.
`--trl_python` is an interpreter that has `trl` and `torch`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import pair as models
from benchmarks.stepwise import Steps
from benchmarks.timing import bandwidth, machine, matmul_rate, ratio
from minillm_jax.data.tokenizer import Tokenizer, load_tokenizer
from minillm_jax.models import DecoderConfig, hf
from minillm_jax.planning.programs import mean_run
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout.mixed import Mixing, longest_chunk

ALPHA = 0.2
LEARNING_RATE = 1e-5
REMAT = "dots"  # `distill.remat`: a third less temporary memory of an update, and no slower here
WIDTH = 4  # bytes of a number
FAILED = (
    "{} has no trl: `python -m venv trl && trl/bin/pip install torch trl==1.16.0`, "
    "then --trl_python trl/bin/python"
)


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models.add_options(parser)
    parser.set_defaults(layers=",".join(map(str, range(0, 30, 3))))
    parser.add_argument("--batch", type=int, default=8, help="responses of a step")
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument(
        "--trl_checkpointing", action="store_true", help="TRL's default: less memory, more time"
    )
    asked = parser.parse_args()
    if not has_trl(asked.trl_python):
        print(FAILED.format(asked.trl_python), file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as made:
        student, teacher = write(Path(made), asked)
        found = measure(Path(made), asked)
    rate, bytes_per_s = max(found["matmul_flops_per_s"]), max(found["bytes_per_s"])
    print(f"matmul {rate / 1e9:.0f} GFLOP/s, memory {bytes_per_s / 1e9:.1f} GB/s at best")
    phases = floor(student, teacher, asked, rate, bytes_per_s)
    found["floor"] = phases | {"seconds": sum(phases.values())}
    show(found)
    if asked.json:
        write_json(asked.json, machine() | found)


def has_trl(python: str) -> bool:
    """Whether an interpreter is there and finds trl and torch."""
    names = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('trl', 'torch'))))"
    try:
        return subprocess.run([python, "-c", names], check=False).returncode == 0
    except OSError:
        return False


def write(folder: Path, asked: argparse.Namespace) -> tuple[DecoderConfig, DecoderConfig]:
    """Write both models and the settings of a step; the configs of student and teacher."""
    teacher, student = models.opened(asked)
    tokenizer = load_tokenizer(teacher.path)
    for name, stored in (("teacher", teacher), ("student", student)):
        hf.save(folder / name, stored.config, stored.read("float32"), stored.hf_config)
        tokenizer.save(folder / name)
    texts = prompts(tokenizer, asked.batch, asked.prompt)
    settings = {
        "prompts": texts,
        "ids": tokenizer.encode_batch(texts),
        "slots": asked.slots,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "remat": REMAT,
        "checkpointing": asked.trl_checkpointing,
    }
    write_json(folder / "steps.json", settings)
    return student.config, teacher.config


def prompts(tokenizer: Tokenizer, rows: int, width: int) -> list[str]:
    """Texts of `width` tokens each: words, every one a single token."""
    texts = tokenizer.decode_batch([[i] for i in range(tokenizer.vocab_size)])
    words = [f" {text.strip()}" for text in texts if text.strip().isalpha() and text.isascii()]
    words = [
        w for w, ids in zip(words, tokenizer.encode_batch(words), strict=True) if len(ids) == 1
    ]
    chosen = np.random.default_rng(0).choice(words, (rows, width))
    return ["".join(row) for row in chosen]


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Steps of both in turn: seconds, peak memory, and the ratios."""
    sides = {
        "trl": Steps([asked.trl_python, "-m", "benchmarks.step_of_trl", str(folder)]),
        "ours": Steps([sys.executable, "-m", "benchmarks.step_of_ours", str(folder)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, dict] = {}
    rates: list[float] = []
    speeds: list[float] = []
    for turn in range(asked.repeats + 1):
        for name, side in sides.items():
            took, last[name] = side.step()
            if turn:  # the first compiles, or fills its pools
                seconds[name].append(took)
        rates.append(matmul_rate())
        speeds.append(bandwidth())
    for side in sides.values():
        side.end()
    found: dict[str, Any] = {"matmul_flops_per_s": rates, "bytes_per_s": speeds} | {
        name: side.about | last[name] | {"seconds": seconds[name]} for name, side in sides.items()
    }
    found["time_ratio"] = ratio(seconds["ours"], seconds["trl"])
    found["memory_ratio"] = found["ours"]["peak_bytes"] / found["trl"]["peak_bytes"]
    return found


def floor(
    student: DecoderConfig, teacher: DecoderConfig, asked: Any, rate: float, bytes_per_s: float
) -> dict[str, float]:
    """Seconds of each phase of our step at this machine's rates, and not less."""
    rows, prompt, slots = asked.batch, asked.prompt, asked.slots
    answers = rows * slots

    def phase(flops: float, numbers: float) -> float:
        return max(flops / rate, numbers * WIDTH / bytes_per_s)

    def cache(config: DecoderConfig) -> float:
        """Numbers of the keys and values that a step reads in the mean."""
        mean = prompt + slots / 2
        return 2 * config.layers * rows * mean * config.kv_heads * config.head_dim

    def reading(config: DecoderConfig) -> float:
        """FLOPs of the layers on the responses alone."""
        return models.forward_flops(config, rows, prompt + slots) - models.forward_flops(
            config, rows, prompt
        )

    mixing = Mixing(slots=slots, alpha=ALPHA, eos_id=0, pad_id=0, vocab=student.vocab_size)
    turns = slots / mean_run(ALPHA, longest_chunk(mixing, rows))
    heads = {config: config.embed_width * config.vocab_size for config in (student, teacher)}
    weights = {c: models.kernels(c) for c in (student, teacher)}
    moments = weights[student] + heads[student]
    return {
        "prompts": sum(
            phase(models.forward_flops(c, rows, prompt), weights[c]) for c in (student, teacher)
        ),
        "student": phase(
            reading(student) + models.head_flops(student, answers),
            slots * (weights[student] + heads[student] + cache(student)),
        ),
        "teacher": phase(reading(teacher), turns * (weights[teacher] + cache(teacher)))
        + phase(models.head_flops(teacher, answers), turns * heads[teacher]),
        "update": phase(models.update_flops(student, teacher, rows, prompt, slots), 0),
        "optimizer": phase(0, 7 * moments),  # reads p, g, m, v and writes p, m, v
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print("| | seconds per step | peak GiB |\n|---|---|---|")
    for name in ("trl", "ours"):
        one = found[name]
        middle = statistics.median(one["seconds"])
        print(f"| {name} | {middle:.2f} | {one['peak_bytes'] / 2**30:.2f} |")
    print(f"ours / trl: time {found['time_ratio']:.2f}, memory {found['memory_ratio']:.2f}")
    print(f"of ours, the collection: {found['ours']['collect_seconds']:.2f} s in the last turn")
    bound = found["floor"]["seconds"]
    least = bound / statistics.median(found["trl"]["seconds"])
    parts = ", ".join(f"{k} {v:.2f}" for k, v in found["floor"].items() if k != "seconds")
    print(f"floor of our step here: {bound:.2f} s ({parts}), {least:.2f} of TRL's time")


if __name__ == "__main__":
    main()
