"""What a collection costs: decoding against the bound of this machine, the teacher's share, the
schedule of the reference, and what rows cost that end early.

    python -m benchmarks.rollout --json rollout.json
    python -m benchmarks.rollout --parts steps --rows 128

1. Seconds of one decoding step of the teacher, and its bound: the larger of the bytes that must
   move (weights, cache) over the bandwidth and of the products over the matmul rate, both measured
   in the same run.
2. The price of teacher-mixed sampling at alpha = 0.2: (mixed - student alone) / teacher alone. The
   teacher draws as many tokens as are expected of it.
3. A collection against the schedule of the reference in the same code: mixed sampling with a step
   of the teacher at every token, a second generation by the student, and six passes that score the
   result, three by each model. The prompts are as long as those of dolly, and the reference reads
   all `--longest_prompt` slots of them, as it pads every batch to its maximum.
4. Answers as long as those of dolly, up to `--longest` tokens, by `generate_shrinking` against the
   same loop for as many rows that all fill their slots.

In the first three no response ends before its last slot.
"""

import argparse
import dataclasses
import itertools
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pair as models
from benchmarks.timing import bandwidth, in_turn, machine, matmul_rate, on_cpu, ratio
from minillm_jax.models import DecoderConfig, head
from minillm_jax.models.ragged import PROMPTS, room
from minillm_jax.objectives import vocab
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout import (
    Mixing,
    Warp,
    collect,
    generate,
    generate_shrinking,
    response_states,
)
from minillm_jax.rollout.mixed import throw_coins

ALPHA = 0.2
PARTS = ("steps", "collection", "early")


def main() -> None:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models.add_options(parser)
    parser.add_argument("--rows", default="1,8,32", help="batch sizes of decoding")
    parser.add_argument("--batch", type=int, default=32, help="responses of the other parts")
    parser.add_argument("--longest", type=int, default=256, help="slots of answers that end early")
    parser.add_argument(
        "--longest_prompt", type=int, default=256, help="slots of the prompts of a collection"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {unknown.pop()}: choose of {', '.join(PARTS)}")
    pair, found = models.load(asked), machine()
    if "steps" in parts:
        found |= steps(pair, asked)
    if "collection" in parts:
        found["collection"] = one = collection(pair, asked)
        for name, value in one["seconds"].items():
            print(f"{name}: {value:.3g} s")
        print(f"price of the teacher at alpha {ALPHA}: {one['price']:.2f} of teacher-only decoding")
        print(f"the reference's schedule: {one['against_reference']:.1f} times ours", flush=True)
    if "early" in parts:
        found["early"] = one = early_ending(pair, asked)
        print(
            f"{asked.batch} answers of {one['tokens']} tokens in {asked.longest} slots each:"
            f" {one['fixed']:.3g} s with all slots, {one['shrinking']:.3g} s as rows leave:"
            f" {one['ratio']:.2f} times"
        )
    if asked.json:
        write_json(asked.json, found)


def steps(pair: models.Pair, asked: argparse.Namespace) -> dict:
    """A decoding step by batch size, against the bound; prints a table."""
    rate, bytes_per_s = matmul_rate(jnp.dtype(asked.dtype)), bandwidth()
    print(f"matmul {rate / 1e9:.0f} GFLOP/s, memory {bytes_per_s / 1e9:.1f} GB/s")
    found = []
    print("| rows | ms per step | bound | of the bound |\n|---|---|---|---|")
    for rows in map(int, asked.rows.split(",")):
        seconds = step_seconds(pair, rows, asked)
        bound = step_bound(pair.teacher, pair.teacher_params, rows, asked, rate, bytes_per_s)
        found.append({"rows": rows, "seconds": seconds, "bound": bound})
        share = f"{100 * bound / seconds:.0f} %"
        print(f"| {rows} | {1e3 * seconds:.3g} | {1e3 * bound:.3g} | {share} |", flush=True)
    return {"matmul_flops_per_s": rate, "bytes_per_s": bytes_per_s, "steps": found}


def _sampler(
    config: DecoderConfig, params, given, slots: int, pair: models.Pair, dtype: str, most=None
):
    """A call that samples `slots` tokens for every prompt, from one model."""
    options: dict[str, Any] = {"warp": Warp(), "eos_id": pair.vocab, "pad_id": 0}
    options |= {"vocab": pair.vocab, "dtype": dtype, "most": most}
    key = jax.random.key(2)
    return lambda: generate(
        config, params, given.prompt, given.prompt_mask, key, slots=slots, **options
    )


def step_seconds(pair: models.Pair, rows: int, asked: argparse.Namespace) -> float:
    """Seconds of one decoding step: the median difference of a long and a short generation."""
    given = models.prompts(rows, asked.prompt, pair.vocab)
    short = max(asked.slots // 4, 1)
    calls = {
        name: _sampler(pair.teacher, pair.teacher_params, given, slots, pair, asked.dtype)
        for name, slots in (("long", asked.slots), ("short", short))
    }
    seconds = in_turn(calls, asked.repeats)
    gaps = [a - b for a, b in zip(seconds["long"], seconds["short"], strict=True)]
    return statistics.median(gaps) / (asked.slots - short)


def step_bound(config, params, rows: int, asked, rate: float, bytes_per_s: float) -> float:
    """Seconds that a step takes at least: by bytes, or by products, whichever is more."""
    leaves = jax.tree.leaves(params)
    width = jnp.dtype(asked.dtype).itemsize
    slots = asked.prompt + asked.slots * 5 // 8  # the middle of what `step_seconds` compares
    cache = 2 * config.layers * rows * config.kv_heads * slots * config.head_dim * width
    moved = sum(x.nbytes for x in leaves) + cache  # an untied embedding is looked up: a few rows
    products = sum(x.size for x in leaves if x.ndim > 1) * rows
    products += 2 * config.layers * rows * config.heads * slots * config.head_dim
    return max(moved / bytes_per_s, 2 * products / rate)


def collection(pair: models.Pair, asked: argparse.Namespace) -> dict:
    """Seconds of a collection and of what it is compared with, and the two ratios."""
    given = models.prompts(asked.batch, asked.longest_prompt, pair.vocab, like_dolly=True)
    alone = partial(_sampler, given=given, slots=asked.slots, pair=pair, dtype=asked.dtype)
    student, padded = (pair.student, pair.params), alone(pair.student, pair.params)
    # One CPU reads the tokens alone, as `Builder.ragged` has it, other devices over padding, too.
    most = room(given.prompt, given.prompt_mask, PROMPTS) if on_cpu() else None

    mixing = Mixing(
        slots=asked.slots, alpha=ALPHA, eos_id=pair.vocab, pad_id=0, vocab=pair.vocab,
        dtype=asked.dtype,
    )  # fmt: skip
    key = usual_key(mixing)

    def mixed(mixing: Mixing, most: int | None = None):
        return collect(
            pair.student, pair.teacher, pair.params, pair.teacher_params,
            given.prompt, given.prompt_mask, key, mixing, most,
        )  # fmt: skip

    def reference():
        rollout, second = mixed(dataclasses.replace(mixing, chunk=1)), padded()
        passes = [
            score(config, params, rollout)
            for config, params in (student, (pair.teacher, pair.teacher_params))
            for _ in range(3)
        ]
        return rollout, second, passes

    calls = {
        "collection": lambda: mixed(mixing, most),
        "student alone": alone(*student, most=most),
        "teacher alone": alone(pair.teacher, pair.teacher_params, most=most),
        "reference": reference,
    }
    seconds = in_turn(calls, asked.repeats)
    extra = [a - b for a, b in zip(seconds["collection"], seconds["student alone"], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "price": ratio(extra, seconds["teacher alone"]),
        "against_reference": ratio(seconds["reference"], seconds["collection"]),
    }


def usual_key(mixing: Mixing) -> jax.Array:
    """The first key whose coins give the teacher as many tokens as are expected of it."""
    expected = round(mixing.alpha * mixing.slots)
    keys = map(jax.random.key, itertools.count())
    return next(key for key in keys if throw_coins(key, mixing).sum() == expected)


def early_ending(pair: models.Pair, asked: argparse.Namespace) -> dict:
    """Seconds of the teacher's answers that are as long as dolly's, and of as many full ones."""
    given = models.prompts(asked.batch, asked.prompt, pair.vocab)
    lengths = models.like(models.DOLLY_ANSWERS, asked.batch, asked.longest)
    lengths = np.random.default_rng(0).permutation(lengths)
    model = pair.teacher, pair.teacher_params
    options = {"warp": Warp(), "eos_id": pair.vocab, "pad_id": 0, "vocab": pair.vocab}

    def answers(limits):
        return generate_shrinking(
            *model, given.prompt, given.prompt_mask, jax.random.key(2), slots=asked.longest,
            limits=jnp.asarray(limits), **options,
        )  # fmt: skip

    full = np.full_like(lengths, asked.longest)
    seconds = in_turn({"fixed": lambda: answers(full), "shrinking": lambda: answers(lengths)}, 1)
    fixed, shrinking = (seconds[name][0] for name in ("fixed", "shrinking"))
    tokens = int(lengths.sum())
    return {"tokens": tokens, "fixed": fixed, "shrinking": shrinking, "ratio": fixed / shrinking}


@partial(jax.jit, static_argnames="config")
def score(config: DecoderConfig, params, rollout) -> jax.Array:
    """Log-probabilities [B, N] of the responses by one pass over them."""
    hidden = response_states(config, params, rollout, dtype=rollout.teacher_hidden.dtype)
    top = head(config, params)
    student = (hidden, top.weight, top.bias)
    labels, mask = rollout.response, rollout.response_mask
    return vocab.scores(*student, None, None, None, labels, mask)["log_q"]


if __name__ == "__main__":
    main()
