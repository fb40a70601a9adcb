"""One model on the held-out prompts: its answers, with every seed, and the figures made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer
from minillm_jax.evaluation import overlap
from minillm_jax.evaluation.divergence import per_token
from minillm_jax.evaluation.exact import exact_match
from minillm_jax.evaluation.lengths import by_length
from minillm_jax.evaluation.rouge import mean_rouge_l, rouge_l, self_rouge_l
from minillm_jax.evaluation.seeds import DEVIATION, over_seeds
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition
from minillm_jax.modelfiles import Model
from minillm_jax.rollout import Warp
from minillm_jax.stages import Run
from minillm_jax.stages.answers import (
    Answered,
    answered,
    references,
    respond,
    sample,
    token_lists,
)
from minillm_jax.stages.measures import SAMPLED, answer_loss, measuring

MAIN = "test"  # the name of `config.data.test` among the test sets
SEEDS_APART = 10  # as in the paper, whose seeds are 10, 20, 30, 40, 50
DECODING = ("plain", "ban")
Figures = dict[str, float]


@dataclass(frozen=True)
class TestSet:
    """Prompts with the answers that count as right, several per prompt where there are."""

    __test__ = False  # for pytest
    name: str
    rows: Sequence[Row]
    examples: Sequence[Example]
    references: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class HeldOut:
    """What came of a model.

    `figures` of the main set, flat; `greedy` texts and coloured `samples` of it, by prompt; by set
    `tests` {set: {decoding: figures}} and `lengths` {set: {bucket: figures}}; every response. Of
    the first seed the `sampled` answers to the main set and what `measure` found on them, if so.
    """

    figures: dict[str, Any]
    greedy: list[str]
    samples: list[dict[str, Any]]
    tests: dict[str, dict[str, Figures]]
    lengths: dict[str, dict[str, Figures]]
    responses: list[dict[str, Any]]
    sampled: Sequence[Answered]
    measured: dict[str, np.ndarray] | None


@dataclass(frozen=True)
class Sample:
    """The answers to a test set with one seed, scored."""

    figures: Figures
    lengths: dict[str, Figures]
    texts: list[str]
    responses: list[dict[str, Any]]


def main_set(run: Run) -> TestSet:
    """The test set of the experiment."""
    examples = answered(run, "test")
    expected = references(run, "test")[: len(examples)]
    return TestSet(MAIN, run.build.data.rows("test"), examples, expected)


def further_sets(run: Run) -> list[TestSet]:
    """Those of `config.data.more_tests`."""
    return [
        TestSet(name, rows, examples, [rows[e.row].output for e in examples])
        for name, (rows, examples) in run.build.data.more_tests().items()
    ]


def seeds(run: Run) -> list[int]:
    """The seeds of the sampled answers, the experiment's own first."""
    count = run.build.config.evaluate.seeds
    return [run.build.seed + SEEDS_APART * i for i in range(count)]


def banned(run: Run) -> Warp | None:
    """The decoding with the n-gram ban, which the paper's evaluation has; None if not wanted."""
    n = run.build.config.evaluate.no_repeat_ngram
    return Warp(no_repeat_ngram=n) if n else None


def parts(run: Run) -> int:
    """How often `held_out` tells that a part is done."""
    c, sets = run.build.config, len(run.build.config.data.more_tests)
    decodings = 1 + bool(c.evaluate.no_repeat_ngram)
    return 2 + c.evaluate.seeds * (1 + sets) * decodings


def held_out(
    run: Run,
    model: Model,
    done: Callable[[int], None] = lambda tokens: None,
    *,
    name: str = "",
    compare: bool = True,
    keep: Path | None = None,
) -> HeldOut:
    """Every figure of one model on the test sets, and its answers.

    `done` is told after each of `parts` how many tokens were written or read in it. With `keep`, a
    folder that has seen no other model of this `name`, answers are kept there and taken from there.

    Sampled answers (each model as it is, the teacher at `teacher.temperature`; the same keys for
    all) give the divergences from the teacher (with `compare`, and of another model) and the text
    statistics; Rouge-L and exact match are against the answers of the test set (the teacher's own,
    where it wrote them); the NLL is that of the first of those. Means over `seeds`, with their
    deviations as `NAME_deviation`.
    """
    build, main = run.build, main_set(run)
    compare = compare and model is not build.teacher
    overlapping = build.config.evaluate.overlap

    def kept(test: TestSet, decoding: str, seed: int) -> Path | None:
        return keep / f"{name}-{test.name}-{decoding}-{seed}.jsonl" if keep else None

    asked = run, model, main.examples
    told = measuring(run, model, overlapping) if compare else None
    file = kept(main, "both", build.seed)
    sampled, best, measured = sample(*asked, build.seed, file=file, measure=told, greedy=True)
    done(_tokens(best))
    samples, figures = [], []
    batches, rows = sampled, measured
    for number, seed in enumerate(seeds(run)):
        if number:
            file = kept(main, "plain", seed)
            more = sample(*asked, seed, file=file, measure=told)
            batches, rows = more.sampled, more.measured
        one = scored(run, name, main, batches, seed)
        figures.append((distances(rows) if rows else {}) | one.figures)
        samples.append(one)
        done(_tokens(batches))
    coloured = _coloured(build.tokenizer, sampled, measured)
    nll = answer_loss(run, main.examples, model)
    done(sum(len(example.response) for example in main.examples))

    of_seeds = over_seeds(figures)
    of_seeds.pop("reverse_kl_stderr_deviation", None)
    if len(samples) > 1:
        same_prompt = list(zip(*(one.texts for one in samples), strict=True))
        of_seeds["prompt_self_rouge_l"] = self_rouge_l(same_prompt)
    greedy, greedy_figures = _greedy(run, best, main)
    found = {"parameters": model.parameters} | of_seeds | {"nll": nll} | greedy_figures

    tests = {MAIN: {"plain": _text_figures(samples)}}
    lengths = {MAIN: _lengths(samples)}
    responses = [row for one in samples for row in one.responses]
    ban = banned(run)
    for test in (main, *further_sets(run)):
        for decoding, warp in zip(DECODING, (SAMPLED, ban), strict=True):
            if warp is None or (test is main and warp is SAMPLED):
                continue
            more = []
            for seed in seeds(run):
                file = kept(test, decoding, seed)
                batches = list(respond(run, model, test.examples, warp, seed, file=file))
                more.append(scored(run, name, test, batches, seed, ban=decoding == "ban"))
                done(_tokens(batches))
            tests.setdefault(test.name, {})[decoding] = _text_figures(more)
            if decoding == "plain":
                lengths[test.name] = _lengths(more)
            responses += [row for one in more for row in one.responses]
    for test, decodings in tests.items():
        for key in ("rouge_l", "exact_match") if test != MAIN else ():
            for end in ("", DEVIATION):
                if key + end in decodings["plain"]:
                    found[f"{key}_{test}{end}"] = decodings["plain"][key + end]
    return HeldOut(found, greedy, coloured, tests, lengths, responses, sampled, measured)


def scored(
    run: Run,
    model: str,
    test: TestSet,
    batches: Sequence[Answered],
    seed: int,
    ban: bool = False,
) -> Sample:
    """The answers of batches against the references of a test set."""
    eos = run.build.tokenizer.eos_id
    ids = [row for batch, real in batches for row in token_lists(batch, real)]
    texts = [text.strip() for text in run.build.tokenizer.decode_batch(ids)]
    finished = [row[-1:] == [eos] for row in ids]
    scores = {
        "rouge_l": [rouge_l(*pair) for pair in zip(texts, test.references, strict=True)],
        "exact_match": [exact_match(*pair) for pair in zip(texts, test.references, strict=True)],
    }
    figures = {name: float(np.mean(values)) for name, values in scores.items()}
    figures |= {"finished": float(np.mean(finished)), "self_rouge_l": self_rouge_l([texts])}
    figures |= describe([_bare(row, eos) for row in ids])
    responses = [
        {
            "test": test.name,
            "model": model,
            "seed": seed,
            "ban": run.build.config.evaluate.no_repeat_ngram if ban else 0,
            "row": example.row,
            "instruction": test.rows[example.row].instruction,
            "input": test.rows[example.row].input,
            "references": list(test.references[number]),
            "response": texts[number],
            "tokens": len(ids[number]),
            "finished": finished[number],
        }
        | {name: values[number] for name, values in scores.items()}
        for number, example in enumerate(test.examples)
    ]
    return Sample(figures, by_length(scores, test.references), texts, responses)


def distances(rows: dict[str, np.ndarray]) -> Figures:
    """Divergences from the teacher on a model's own samples, from `measure`, in nats per token.

    And the overlap with its likeliest ids, per token, where that was measured.
    """
    value, error = per_token(rows, "reverse_kl")
    found = {"reverse_kl": value, "reverse_kl_stderr": error}
    found |= {name: per_token(rows, name)[0] for name in ("forward_kl", "entropy")}
    return found | {
        f"top_k_{name}": per_token(rows, name)[0] for name in overlap.KEYS if name in rows
    }


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of an answer by token; of a character in several tokens the last one has it all."""
    found, before = [], ""
    for text in tokenizer.decode_batch([ids[: n + 1] for n in range(len(ids))]):
        half = text.endswith("\N{REPLACEMENT CHARACTER}")
        found.append("" if half else text[len(before) :])
        before = before if half else text
    return found


def _coloured(
    tokenizer: Tokenizer, batches: Sequence[Answered], rows: dict[str, np.ndarray] | None
) -> list[dict[str, Any]]:
    """Each answer as `pieces`, and with `rows` its `log_ratio` log(p / q) per token."""
    ids = [row for batch, real in batches for row in token_lists(batch, real)]
    found: list[dict[str, Any]] = [{"pieces": pieces(tokenizer, row)} for row in ids]
    if rows is not None:
        for sample, row, ratio in zip(found, ids, rows["log_ratio"], strict=True):
            sample["log_ratio"] = [round(float(value), 3) for value in ratio[: len(row)]]
    return found


def _greedy(run: Run, batches: Sequence[Answered], main: TestSet) -> tuple[list[str], Figures]:
    eos = run.build.tokenizer.eos_id
    ids = [row for batch, real in batches for row in token_lists(batch, real)]
    bare = [_bare(row, eos) for row in ids]
    texts = [text.strip() for text in run.build.tokenizer.decode_batch(ids)]
    return texts, {
        "greedy_rouge_l": mean_rouge_l(texts, main.references),
        "greedy_finished": float(np.mean([row[-1:] == [eos] for row in ids])),
        "greedy_length": float(np.mean([len(row) for row in bare])),
        "greedy_distinct_4": distinct_n(bare, 4),
        "greedy_repetition": float(np.mean([repetition(row) for row in bare])),
        "greedy_loops": float(np.mean([loops(row) for row in bare])),
    }


def _bare(ids: Sequence[int], eos: int) -> list[int]:
    return [i for i in ids if i != eos]


def _text_figures(samples: Sequence[Sample]) -> Figures:
    return {"count": len(samples[0].texts)} | over_seeds([one.figures for one in samples])


def _lengths(samples: Sequence[Sample]) -> dict[str, Figures]:
    found = {}
    for bucket, first in samples[0].lengths.items():
        runs = [one.lengths[bucket] for one in samples]
        means = over_seeds([{k: v for k, v in r.items() if k != "count"} for r in runs])
        found[bucket] = {"count": first["count"]} | means
    return found


def _tokens(batches: Sequence[Answered]) -> int:
    return sum(int(batch.response_mask[:real].sum()) for batch, real in batches)
