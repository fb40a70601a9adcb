"""Answers of a model to prompts, and the stage in which the teacher writes what SFT learns from."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from minillm_jax.build import SPLITS, Model
from minillm_jax.data.examples import Example
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import read_rows, write_rows
from minillm_jax.rollout import Warp, generate
from minillm_jax.stages import Outcome, Run
from minillm_jax.types import Sequences


def respond(
    run: Run, model: Model, examples: Sequence[Example], warp: Warp, seed: int
) -> Iterator[tuple[Sequences, int]]:
    """Let `model` answer prompts, in order: batches, and how many of their rows are real."""
    key = jax.random.key(seed)
    options = run.build.generation(warp)
    for index, (batch, real) in enumerate(run.build.ordered(examples)):
        answer = generate(
            model.config,
            model.params,
            batch.prompt,
            batch.prompt_mask,
            jax.random.fold_in(key, index),
            **options,
        )
        mask = np.asarray(answer.mask)
        mask = mask & (np.arange(len(mask)) < real)[:, None]
        answered = Sequences(batch.prompt, batch.prompt_mask, np.asarray(answer.tokens), mask)
        yield answered, real


def token_lists(batch: Sequences, real: int) -> list[list[int]]:
    """The ids of the first `real` responses, the end of sequence included."""
    pairs = zip(batch.response[:real], batch.response_mask[:real], strict=True)
    return [[int(i) for i in row[mask]] for row, mask in pairs]


def teacher_answers(run: Run) -> Outcome:
    """The teacher answers the prompts of every split; rows with text and exact token ids."""
    c = run.build.config.answers
    warp = Warp(temperature=c.temperature, top_p=c.top_p)
    rows, tokens = [], 0
    asked = {split: run.build.prompts(split) for split in SPLITS}
    asked["train"] = asked["train"][: c.limit or None]
    with Progress("teacher_answers", sum(map(len, asked.values()))) as bar:
        for number, (split, prompts) in enumerate(asked.items()):
            source = run.build.rows(split)
            done = 0
            seed = run.build.seed * len(SPLITS) + number
            for batch, real in respond(run, run.build.teacher, prompts, warp, seed):
                found = token_lists(batch, real)
                texts = run.build.tokenizer.decode_batch(found)
                for example, ids, text in zip(prompts[done:], found, texts, strict=False):
                    row = source[example.row]
                    rows.append(
                        {
                            "split": split,
                            "instruction": row.instruction,
                            "input": row.input,
                            "output": text.strip(),
                            "tokens": ids,
                        }
                    )
                done += real
                tokens += sum(map(len, found))
                bar.update(len(rows), tokens=sum(map(len, found)))
    write_rows(run.folder("teacher_answers") / "answers.jsonl", rows)
    return {"tokens": tokens, "updates": 0}


def answered(run: Run, split: str) -> list[Example]:
    """The prompts of a split with the teacher's answers, token for token as it wrote them."""
    rows = read_rows(run.folder("teacher_answers") / "answers.jsonl")
    found = [row for row in rows if row["split"] == split]
    return [
        Example(prompt.prompt, tuple(row["tokens"]), prompt.row)
        for prompt, row in zip(run.build.prompts(split), found, strict=False)  # limited
    ]
