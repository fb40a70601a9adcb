"""The stage that judges every model on the held-out prompts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minillm_jax.build import Model
from minillm_jax.evaluation.divergence import per_token
from minillm_jax.evaluation.rouge import mean_rouge_l
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import read_rows, write_json, write_rows
from minillm_jax.rollout import Warp
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import answered, respond, token_lists
from minillm_jax.stages.measures import SAMPLED, answer_loss, measure

GREEDY = Warp(temperature=0.0)


def held_out(run: Run, model: Model) -> tuple[dict[str, Any], list[str]]:
    """Every held-out figure of one model, and its greedy answers.

    Sampled answers (temperature 1, the same key for every model) give the reverse KL and the text
    statistics; Rouge-L is against the teacher's own sampled answer; the NLL is that of that answer.
    """
    build = run.build
    examples = answered(run, "test")
    references = build.tokenizer.decode_batch([e.response for e in examples])
    eos = build.tokenizer.eos_id

    sampled = list(respond(run, model, examples, SAMPLED, build.seed))
    distances = {} if model is build.teacher else distance(run, model, sampled)
    answers = [ids for batch, real in sampled for ids in token_lists(batch, real)]
    bare = [[i for i in ids if i != eos] for ids in answers]
    nll = answer_loss(run, examples, model)

    greedy = [
        ids
        for batch, real in respond(run, model, examples, GREEDY, 0)
        for ids in token_lists(batch, real)
    ]
    greedy_bare = [[i for i in ids if i != eos] for ids in greedy]
    texts = [text.strip() for text in build.tokenizer.decode_batch(greedy)]
    sampled_texts = build.tokenizer.decode_batch(answers)
    figures = {
        "parameters": model.parameters,
        **distances,
        "nll": nll,
        "rouge_l": mean_rouge_l(sampled_texts, references),
        "greedy_rouge_l": mean_rouge_l(texts, references),
        "finished": float(np.mean([ids[-1:] == [eos] for ids in answers])),
        "greedy_finished": float(np.mean([ids[-1:] == [eos] for ids in greedy])),
        "greedy_length": float(np.mean([len(ids) for ids in greedy_bare])),
        "greedy_distinct_4": distinct_n(greedy_bare, 4),
        "greedy_repetition": float(np.mean([repetition(ids) for ids in greedy_bare])),
        "greedy_loops": float(np.mean([loops(ids) for ids in greedy_bare])),
    } | describe(bare)
    return figures, texts


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
    makers: dict[str, Callable[[], Model]] = {
        "teacher": lambda: build.teacher,
        "start": build.student,
        "sft": lambda: build.student(run.model("student_sft")),
        "minillm": lambda: build.student(run.model("distill")),
    }
    needs = {"sft": "student_sft", "minillm": "distill"}
    makers = {k: v for k, v in makers.items() if k not in needs or run.model(needs[k]).is_dir()}
    figures, texts = {}, {}
    with Progress("evaluate", len(makers)) as bar:
        for number, (name, make) in enumerate(makers.items(), 1):
            figures[name], texts[name] = held_out(run, make())
            bar.update(number)
    references = [row for row in read_rows(run.folder("teacher_answers") / "answers.jsonl")]
    references = [row for row in references if row["split"] == "test"]
    rows = []
    for index, answers in enumerate(zip(*texts.values(), strict=True)):
        row = references[index]
        kept = {"instruction": row["instruction"], "input": row["input"]}
        rows.append(
            kept | {"reference": row["output"], "answers": dict(zip(texts, answers, strict=True))}
        )
    write_rows(run.workdir / "evaluate" / "answers.jsonl", rows)
    write_json(run.workdir / "evaluate" / "figures.json", figures)
    return {"tokens": 0, "updates": 0}
