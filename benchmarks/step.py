"""What an update costs: tokens per second, share of the machine's matmul rate, compilation.

    python -m benchmarks.step --json step.json

Updates of SFT and of MiniLLM on made-up rows. FLOPs are those of the model: of the student three
times its forward pass, in MiniLLM also the product of the stored teacher states with the teacher's
head; what is computed again is not counted. The rate is measured before each update that counts.
The gap is what an update takes longer when the next one is asked for only after it has ended.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import pair as models
from benchmarks.timing import machine, matmul_rate
from minillm_jax import optim
from minillm_jax.methods import minillm, sft
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout import Mixing, Rollout
from minillm_jax.types import Sequences


def main() -> None:
    """Measure the updates and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models.add_options(parser)
    parser.add_argument("--batch", type=int, default=8, help="rows of an update")
    parser.add_argument("--remat", default="none", help="none, dots or full")
    asked = parser.parse_args()
    pair = models.load(asked)
    print("| update | compilation s | seconds | gap s | tokens/s | of the matmul rate |")
    print("|---|---|---|---|---|---|")
    found = []
    for name in ("sft", "minillm"):
        one = measure(name, pair, asked)
        found.append(one)
        print(
            f"| {name} | {one['compile_seconds']:.1f} | {one['seconds']:.3g} | {one['gap']:.2g}"
            f" | {one['tokens_per_s']:,.0f} | {100 * one['mfu']:.0f} % |",
            flush=True,
        )
    if asked.json:
        write_json(asked.json, machine() | {"updates": found})


def measure(name: str, pair: models.Pair, asked: argparse.Namespace) -> dict[str, Any]:
    """Figures of one kind of update."""
    rate = optim.schedule("constant", 1e-5)
    optimizer = optim.adamw(rate)
    common: dict[str, Any] = {"dtype": asked.dtype, "remat": asked.remat}
    if name == "sft":
        method = sft.method(pair.student, optimizer, rate, vocab=pair.vocab, **common)
        frozen, batch = None, _rows(pair, asked)
    else:
        mixing = Mixing(
            slots=asked.slots, alpha=0.2, eos_id=0, pad_id=0, vocab=pair.vocab,
            dtype=asked.dtype,
        )  # fmt: skip
        policy = PRESETS["corrected"]
        method = minillm.method(
            pair.student, pair.teacher, optimizer, rate, policy=policy, mixing=mixing, **common
        )
        frozen, batch = pair.teacher_params, _rollout(pair, asked)
    update: Any = method.update
    state = models.state(pair.student, jax.tree.map(jnp.copy, pair.params), optimizer)
    began = time.perf_counter()
    program = update.lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - began
    state, _ = jax.block_until_ready(program(state, frozen, batch))
    alone, chained, rates = [], [], []
    for _ in range(asked.repeats):
        rates.append(matmul_rate(jnp.dtype(asked.dtype)))  # each time: the machine's speed drifts
        began = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, frozen, batch))
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(2):
            state, _ = program(state, frozen, batch)
        jax.block_until_ready(state)
        chained.append((time.perf_counter() - began) / 2)
    seconds, tokens = statistics.median(chained), asked.batch * (asked.prompt + asked.slots)
    teacher = pair.teacher if name == "minillm" else None
    flops = models.update_flops(pair.student, teacher, asked.batch, asked.prompt, asked.slots)
    return {
        "update": name,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "gap": statistics.median(a - b for a, b in zip(alone, chained, strict=True)),
        "tokens_per_s": tokens / seconds,
        "flops": flops,
        "matmul_flops_per_s": rates,
        "mfu": statistics.median(flops / a / b for a, b in zip(chained, rates, strict=True)),
    }


def _rows(pair: models.Pair, asked: argparse.Namespace) -> Sequences:
    given = models.prompts(asked.batch, asked.prompt, pair.vocab)
    answers = models.prompts(asked.batch, asked.slots, pair.vocab)
    return replace(given, response=answers.prompt, response_mask=answers.prompt_mask)


def _rollout(pair: models.Pair, asked: argparse.Namespace) -> Rollout:
    rows = _rows(pair, asked)
    guess = jnp.full(rows.response.shape, -3.0)
    shape = (*rows.response.shape, pair.teacher.embed_width)
    hidden = jax.random.normal(jax.random.key(4), shape, asked.dtype)
    return Rollout(
        rows.prompt, rows.prompt_mask, rows.response, rows.response_mask,
        log_q=guess, log_p=guess, log_mix=guess, teacher_hidden=hidden,
    )  # fmt: skip


if __name__ == "__main__":
    main()
