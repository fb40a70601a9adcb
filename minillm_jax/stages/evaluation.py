"""The stage that judges every model on the held-out prompts."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax.evaluation.divergence import KEYS, per_token
from minillm_jax.evaluation.rouge import mean_rouge_l
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition
from minillm_jax.modelfiles import Model
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import write_json, write_rows
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import answer, answered, in_batches, references, token_lists
from minillm_jax.stages.measures import SAMPLED, batch_nll, measure

Row = dict[str, Any]
Told = Callable[[int], None]


def held_out(
    run: Run, model: Model, file: Path | None = None, done: Told = lambda tokens: None
) -> tuple[dict[str, Any], list[str]]:
    """Every held-out figure of one model, and its greedy answers.

    What they are made of goes to `file` row by row (None: to none that stays), and rows that are
    there already are taken from it. `done` is told after each batch how many tokens it had.

    Sampled answers (each model as it is, the teacher at `teacher.temperature`; the same key for
    all) give the reverse KL and the text statistics; Rouge-L is against the answers of the test set
    (the teacher's own, where it wrote them); the NLL is that of those answers. Of further test sets
    Rouge-L alone.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        file = file or Path(nowhere) / "rows.jsonl"
        rows = judge(run, model, file, done)
        further = {
            f"rouge_l_{name}": further_rouge_l(
                run, model, name, file.with_suffix(f".{name}.jsonl"), done
            )
            for name in run.build.data.more_tests()
        }
    return _figures(run, model, rows) | further, _texts(run, rows, "greedy")


def judge(run: Run, model: Model, file: Path, done: Told) -> list[Row]:
    """A row per test prompt: `sampled` and `greedy` ids, `nll` with `nll_tokens` of the given
    answer, and but for the teacher `KEYS` and `tokens` of the sampled one."""
    build = run.build
    key = jax.random.key(build.seed)
    batches = [
        ((batch, real, jax.random.fold_in(key, index)), real)
        for index, (batch, real) in enumerate(build.data.ordered(answered(run, "test")))
    ]

    def work(here) -> list[Row]:
        batch, real, key = here
        width = len(batch.prompt)
        both = answer(run, model, batch, np.arange(width) < real, SAMPLED, key, with_greedy=True)
        sampled, greedy = (
            jax.tree.map(lambda x, part=part: x[part], both)
            for part in (slice(width), slice(width, None))
        )
        columns: dict[str, Any] = {
            "sampled": token_lists(sampled, real),
            "greedy": token_lists(greedy, real),
            "nll": batch_nll(run, model, batch)[:real],
            "nll_tokens": batch.response_mask[:real].sum(axis=1),
        }
        if model is not build.teacher:
            columns |= measure(run, model, [(sampled, real)])
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    found = []
    for rows in in_batches(file, batches, work):
        found += rows
        done(sum(len(r["sampled"]) + len(r["greedy"]) + int(r["nll_tokens"]) for r in rows))
    return found


def _texts(run: Run, rows: Sequence[Row], kind: str) -> list[str]:
    return [text.strip() for text in run.build.tokenizer.decode_batch([r[kind] for r in rows])]


def _figures(run: Run, model: Model, rows: Sequence[Row]) -> dict[str, Any]:
    expected = references(run, "test")[: len(rows)]
    eos = run.build.tokenizer.eos_id
    sampled, greedy = ([row[kind] for row in rows] for kind in ("sampled", "greedy"))
    bare, greedy_bare = ([[i for i in ids if i != eos] for ids in a] for a in (sampled, greedy))
    distances = {}
    if "tokens" in rows[0]:  # the teacher's divergence from itself is 0
        sums = {name: np.array([row[name] for row in rows]) for name in (*KEYS, "tokens")}
        value, error = per_token(sums, "reverse_kl")
        distances = {"reverse_kl": value, "reverse_kl_stderr": error}
        distances["entropy"] = per_token(sums, "entropy")[0]
    given = max(sum(row["nll_tokens"] for row in rows), 1)
    return {
        "parameters": model.parameters,
        **distances,
        "nll": float(sum(row["nll"] for row in rows) / given),
        "rouge_l": mean_rouge_l(run.build.tokenizer.decode_batch(sampled), expected),
        "greedy_rouge_l": mean_rouge_l(_texts(run, rows, "greedy"), expected),
        "finished": float(np.mean([ids[-1:] == [eos] for ids in sampled])),
        "greedy_finished": float(np.mean([ids[-1:] == [eos] for ids in greedy])),
        "greedy_length": float(np.mean([len(ids) for ids in greedy_bare])),
        "greedy_distinct_4": distinct_n(greedy_bare, 4),
        "greedy_repetition": float(np.mean([repetition(ids) for ids in greedy_bare])),
        "greedy_loops": float(np.mean([loops(ids) for ids in greedy_bare])),
    } | describe(bare)


def further_rouge_l(run: Run, model: Model, name: str, file: Path, done: Told) -> float:
    """Rouge-L of sampled answers on a further test set."""
    rows, examples = run.build.data.more_tests()[name]
    key = jax.random.key(run.build.seed)
    batches = [
        ((batch, real, jax.random.fold_in(key, index)), real)
        for index, (batch, real) in enumerate(run.build.data.ordered(examples))
    ]

    def work(here) -> list[Row]:
        batch, real, key = here
        counted = np.arange(len(batch.prompt)) < real
        found = token_lists(answer(run, model, batch, counted, SAMPLED, key), real)
        return [{"sampled": ids} for ids in found]

    found = []
    for part in in_batches(file, batches, work):
        found += part
        done(sum(len(row["sampled"]) for row in part))
    texts = run.build.tokenizer.decode_batch([row["sampled"] for row in found])
    return mean_rouge_l(texts, [rows[e.row].output for e in examples])


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
    sets = [answered(run, "test"), *(examples for _, examples in build.data.more_tests().values())]
    batches = sum(len(build.data.ordered(examples)) for examples in sets)
    with Progress("evaluate", batches * len(makers)) as bar:

        def done(tokens: int) -> None:
            parts.append(tokens)
            bar.update(len(parts), tokens=tokens)

        for name, make in makers.items():
            figures[name], texts[name] = held_out(
                run, make(), run.folder("evaluate") / f"{name}.jsonl", done
            )
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
