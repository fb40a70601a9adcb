"""Answers of a model to prompts, and the stage in which the teacher writes what SFT learns from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.data.examples import Example
from minillm_jax.dataset import SPLITS
from minillm_jax.modelfiles import Model
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import read_rows, write_rows
from minillm_jax.rollout import Warp, generate
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Outcome, Run
from minillm_jax.types import Sequences

Answered = tuple[Sequences, int]  # a batch, and how many of its rows are real


def respond(
    run: Run,
    model: Model,
    examples: Sequence[Example],
    warp: Warp,
    seed: int,
    batch_size: int = 0,
) -> Iterator[Answered]:
    """Let `model` answer prompts, in order, so many at a time (0: as in evaluation)."""
    key = jax.random.key(seed)
    for index, (batch, real) in enumerate(run.build.data.ordered(examples, batch_size)):
        counted = np.arange(len(batch.prompt)) < real
        yield _answer(run, model, batch, counted, warp, jax.random.fold_in(key, index)), real


def respond_twice(
    run: Run, model: Model, examples: Sequence[Example], seed: int
) -> tuple[list[Answered], list[Answered]]:
    """Let `model` answer prompts, sampled at temperature 1 and greedily, in one batch."""
    key = jax.random.key(seed)
    sampled: list[Answered] = []
    greedy: list[Answered] = []
    for index, (batch, real) in enumerate(run.build.data.ordered(examples)):
        rows = len(batch.prompt)
        counted = np.arange(rows) < real
        once = jax.random.fold_in(key, index)
        found = _answer(run, model, batch, counted, Warp(), once, with_greedy=True)
        sampled.append((jax.tree.map(lambda x, rows=rows: x[:rows], found), real))
        greedy.append((jax.tree.map(lambda x, rows=rows: x[rows:], found), real))
    return sampled, greedy


def _answer(run, model, batch, counted, warp, key, with_greedy=False) -> Sequences:
    """The answers of a batch; of rows that are not `counted` [B] the mask stays empty."""
    options = run.build.generation(warp) | {"dtype": run.build.arithmetic(model)}
    ids, real = place((batch.prompt, batch.prompt_mask), batch_sharding(run.build.mesh))
    options["with_greedy"] = with_greedy
    answer = generate(model.config, model.params, ids, real, key, **options)
    times = 1 + with_greedy
    return Sequences(
        prompt=np.tile(batch.prompt, (times, 1)),
        prompt_mask=np.tile(batch.prompt_mask, (times, 1)),
        response=hosts.fetch(answer.tokens),
        response_mask=hosts.fetch(answer.mask) & np.tile(counted, times)[:, None],
    )


def token_lists(batch: Sequences, real: int) -> list[list[int]]:
    """The ids of the first `real` responses, the end of sequence included."""
    pairs = zip(batch.response[:real], batch.response_mask[:real], strict=True)
    return [[int(i) for i in row[mask]] for row, mask in pairs]


def texts_of(run: Run, batches: Iterable[Answered]) -> list[str]:
    """The text of the responses of batches, row by row."""
    found = [ids for batch, real in batches for ids in token_lists(batch, real)]
    return run.build.tokenizer.decode_batch(found)


def teacher_answers(run: Run) -> Outcome:
    """The teacher answers the prompts; rows with text and exact token ids.

    Those of every split, or of the training split alone where the data has answers itself.
    """
    c = run.build.config.answers
    rows, tokens = [], 0
    splits = SPLITS if c.source == "teacher" else ("train",)
    asked = {split: run.build.data.prompts(split) for split in splits}
    asked["train"] = asked["train"][: c.limit or None]
    with Progress("teacher_answers", sum(map(len, asked.values()))) as bar:
        for number, (split, prompts) in enumerate(asked.items()):
            source = run.build.data.rows(split)
            done = 0
            seed = run.build.seed * len(SPLITS) + number
            # p as it is: its temperature is that of `config.teacher`.
            batches = respond(run, run.build.teacher, prompts, Warp(), seed, c.batch_size)
            for batch, real in batches:
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


def answered(run: Run, split: str, source: str = "") -> list[Example]:
    """The prompts of a split with the answers of `source` (empty: the experiment's).

    Those of the teacher are token for token as it wrote them.
    """
    if (source or run.build.outline.answers) == "data":
        return run.build.data.gold(split)
    # The teacher may have been asked fewer prompts than there are.
    pairs = zip(run.build.data.prompts(split), _rows(run, split), strict=False)
    return [Example(asked.prompt, tuple(row["tokens"]), asked.row) for asked, row in pairs]


def references(run: Run, split: str, source: str = "") -> list[tuple[str, ...]]:
    """The answers of `source` as text, for Rouge-L: of the data there may be several per prompt."""
    if (source or run.build.outline.answers) == "data":
        rows = run.build.data.rows(split)
        return [rows[example.row].output for example in run.build.data.prompts(split)]
    return [(row["output"],) for row in _rows(run, split)]


def _rows(run: Run, split: str) -> list[dict[str, Any]]:
    rows = read_rows(run.folder("teacher_answers") / "answers.jsonl")
    return [row for row in rows if row["split"] == split]
