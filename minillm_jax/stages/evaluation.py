"""The stage that judges every model on the held-out prompts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minillm_jax.evaluation.divergence import per_token
from minillm_jax.evaluation.rouge import mean_rouge_l
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition
from minillm_jax.modelfiles import Model
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import write_json, write_rows
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import (
    Answered,
    answered,
    references,
    respond,
    respond_twice,
    texts_of,
    token_lists,
)
from minillm_jax.stages.measures import SAMPLED, answer_loss, measure

PARTS = 3  # of the judgement of a model


def held_out(
    run: Run, model: Model, done: Callable[[int], None] = lambda tokens: None
) -> tuple[dict[str, Any], list[str]]:
    """Every held-out figure of one model, and its greedy answers.

    `done` is told after each of `PARTS` parts how many tokens were written or read in it.

    Sampled answers (each model as it is, the teacher at `teacher.temperature`; the same key for
    all) give the reverse KL and the text statistics; Rouge-L is against the answers of the test set
    (the teacher's own, where it wrote them); the NLL is that of those answers. Of further test sets
    Rouge-L alone.
    """
    build = run.build
    examples = answered(run, "test")
    expected = references(run, "test")[: len(examples)]
    eos = build.tokenizer.eos_id

    sampled, best = respond_twice(run, model, examples, build.seed)
    done(_tokens(sampled) + _tokens(best))
    distances = {} if model is build.teacher else distance(run, model, sampled)
    done(_tokens(sampled))
    answers = [ids for batch, real in sampled for ids in token_lists(batch, real)]
    bare = [[i for i in ids if i != eos] for ids in answers]
    nll = answer_loss(run, examples, model)
    done(sum(len(example.response) for example in examples))

    greedy = [ids for batch, real in best for ids in token_lists(batch, real)]
    greedy_bare = [[i for i in ids if i != eos] for ids in greedy]
    texts = [text.strip() for text in build.tokenizer.decode_batch(greedy)]
    sampled_texts = build.tokenizer.decode_batch(answers)
    figures = {
        "parameters": model.parameters,
        **distances,
        "nll": nll,
        "rouge_l": mean_rouge_l(sampled_texts, expected),
        "greedy_rouge_l": mean_rouge_l(texts, expected),
        "finished": float(np.mean([ids[-1:] == [eos] for ids in answers])),
        "greedy_finished": float(np.mean([ids[-1:] == [eos] for ids in greedy])),
        "greedy_length": float(np.mean([len(ids) for ids in greedy_bare])),
        "greedy_distinct_4": distinct_n(greedy_bare, 4),
        "greedy_repetition": float(np.mean([repetition(ids) for ids in greedy_bare])),
        "greedy_loops": float(np.mean([loops(ids) for ids in greedy_bare])),
    } | describe(bare)
    return figures | further(run, model), texts


def _tokens(batches: list[Answered]) -> int:
    return sum(int(batch.response_mask[:real].sum()) for batch, real in batches)


def further(run: Run, model: Model) -> dict[str, float]:
    """Rouge-L of sampled answers on the further test sets, as `rouge_l_NAME`."""
    figures = {}
    for name, (rows, examples) in run.build.data.more_tests().items():
        texts = texts_of(run, respond(run, model, examples, SAMPLED, run.build.seed))
        figures[f"rouge_l_{name}"] = mean_rouge_l(texts, [rows[e.row].output for e in examples])
    return figures


def distance(run: Run, model: Model, sampled: Any) -> dict[str, float]:
    """Divergence from the teacher on the model's own samples; the teacher's from itself is 0."""
    rows = measure(run, model, sampled)
    value, error = per_token(rows, "reverse_kl")
    return {
        "reverse_kl": value,
        "reverse_kl_stderr": error,
        "entropy": per_token(rows, "entropy")[0],
    }


def evaluate(run: Run) -> Outcome:
    """Held-out figures and answers of the teacher and of the student at each stage."""
    build = run.build
    tuned = build.outline.fine_tuned_student
    makers: dict[str, Callable[[], Model]] = {"teacher": lambda: build.teacher}
    if not tuned:
        makers["start"] = build.student
    if tuned or run.model("student_sft").is_dir():
        makers["sft"] = lambda: build.student(None if tuned else run.model("student_sft"))
    if run.model("distill").is_dir():
        makers[build.outline.method] = lambda: build.student(run.model("distill"))
    figures, texts = {}, {}
    parts: list[int] = []
    with Progress("evaluate", PARTS * len(makers)) as bar:

        def done(tokens: int) -> None:
            parts.append(tokens)
            bar.update(len(parts), tokens=tokens)

        for name, make in makers.items():
            figures[name], texts[name] = held_out(run, make(), done)
    rows, expected = build.data.rows("test"), references(run, "test")
    kept = []
    for example, reference, *answers in zip(
        build.data.prompts("test"), expected, *texts.values(), strict=False
    ):
        row = rows[example.row]
        kept.append(
            {
                "instruction": row.instruction,
                "input": row.input,
                "reference": reference[0],
                "answers": dict(zip(texts, answers, strict=True)),
            }
        )
    write_rows(run.workdir / "evaluate" / "answers.jsonl", kept)
    write_json(run.workdir / "evaluate" / "figures.json", figures)
    return {"tokens": sum(parts), "updates": 0}
