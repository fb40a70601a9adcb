"""Answers of a model to prompts, and the stage in which the teacher writes what SFT learns from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minillm_jax import hosts, stopping
from minillm_jax.data.examples import Example
from minillm_jax.dataset import SPLITS
from minillm_jax.modelfiles import Model
from minillm_jax.models.ragged import PROMPTS, room
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import RowLog, jsonable, read_rows, write_rows
from minillm_jax.rollout import Warp, Written, generate_shrinking
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Outcome, Run
from minillm_jax.types import Sequences

Answered = tuple[Sequences, int]  # a batch, and how many of its rows are real
Measure = Callable[[Sequences, int], dict[str, np.ndarray]]  # figures of those rows, [R] or [R, N]
_MEASURED = "measured"  # in a row of a file of answers
PUSHED_EVERY = 30.0  # seconds between two uploads of answers, where the run is in a bucket


class Answers(NamedTuple):
    """Sampled answers batch by batch, greedy ones to the same prompts, and figures of the former.

    Where they were not asked for `greedy` is empty and `measured` {name: [R] or, per token, [R, N]}
    None.
    """

    sampled: list[Answered]
    greedy: list[Answered]
    measured: dict[str, np.ndarray] | None


def respond(
    run: Run,
    model: Model,
    examples: Sequence[Example],
    warp: Warp,
    seed: int,
    *,
    file: Path | None = None,
) -> Iterator[Answered]:
    """Let `model` answer prompts, in order, as many at a time as evaluation does.

    With `file` the answers are kept there, and those that are there already are read: the file is
    that of this model, warp and seed.
    """
    for (found,), real, _ in _respond(run, model, examples, warp, seed, file, ("ids",)):
        yield found, real


def sample(
    run: Run,
    model: Model,
    examples: Sequence[Example],
    seed: int,
    *,
    greedy: bool = False,
    measure: Measure | None = None,
    file: Path | None = None,
) -> Answers:
    """Let `model` answer prompts at temperature 1; with `greedy` the best tokens, too, in one go.

    `measure` says something of the sampled answers of `model`, which it gets as `Written` where it
    would take time to read them again; what it says is kept in `file` (as for `respond`) with
    them, so that an evaluation that was stopped ends with the same figures.
    """
    names = ("sampled", "greedy") if greedy else ("ids",)
    found = list(_respond(run, model, examples, Warp(), seed, file, names, measure))
    by_name = [[(batches[i], real) for batches, real, _ in found] for i in range(len(names))]
    measured = None
    if measure:
        parts = [figures for *_, figures in found]
        measured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Answers(by_name[0], by_name[1] if greedy else [], measured)


def _respond(
    run, model, examples, warp, seed, file, names: tuple[str, ...], measure=None
) -> Iterator[tuple[list[Sequences], int, dict[str, np.ndarray]]]:
    """Answers under one name, or under two sampled and greedy ones, and figures of the first."""
    key = jax.random.key(seed)
    batches = [
        ((batch, real, jax.random.fold_in(key, index)), real)
        for index, (batch, real) in enumerate(run.build.data.ordered(examples))
    ]
    # In bfloat16 the states of decoding are not rounded as those of a second reading.
    states = measure and run.build.ragged and run.build.arithmetic(model) == "float32"
    options = {"with_greedy": len(names) > 1, "with_states": bool(states)}

    def work(here) -> list[dict[str, Any]]:
        batch, real, key = here
        width = len(batch.prompt)
        counted = np.arange(width) < real
        both = answer(run, model, batch, counted, warp, key, **options)
        parts = [
            jax.tree.map(lambda x, first=k * width: x[first : first + width], both)
            for k in range(len(names))
        ]
        ids = [token_lists(part, real) for part in parts]
        rows: list[Any] = [dict(zip(names, row, strict=True)) for row in zip(*ids, strict=True)]
        if measure:
            found = measure(parts[0], real)
            for i, row in enumerate(rows):
                row[_MEASURED] = {
                    name: x[i, : len(ids[0][i])] if x.ndim > 1 else x[i]
                    for name, x in found.items()
                }
        return rows

    for ((batch, real, _), _), rows in zip(batches, in_batches(file, batches, work), strict=True):
        run.keep(every=PUSHED_EVERY)
        found = [_filled(run, batch, [row[name] for row in rows]) for name in names]
        figures = {}
        if measure and all(_MEASURED in row for row in rows):
            figures = _stacked([row[_MEASURED] for row in rows], found[0].response.shape[1])
        elif measure:  # a file of an earlier version
            figures = measure(found[0], real)
        yield found, real, figures


def _stacked(rows: list[dict[str, Any]], slots: int) -> dict[str, np.ndarray]:
    """The figures of rows, those per token with zeros behind an answer."""

    def padded(value: Any) -> np.ndarray:
        one = np.asarray(value, np.float64)  # None is no number
        return np.pad(one, (0, slots - len(one))) if one.ndim else one

    return {name: np.stack([padded(row[name]) for row in rows]) for name in rows[0]}


def _filled(run: Run, batch: Sequences, ids: Sequence[Sequence[int]]) -> Sequences:
    """The prompts of a batch with these responses, in the slots of generation."""
    options = run.build.generation(Warp())
    shape = (len(batch.prompt), options["slots"])
    response, mask = np.full(shape, options["pad_id"], np.int32), np.zeros(shape, bool)
    for row, answered in enumerate(ids):
        response[row, : len(answered)] = answered
        mask[row, : len(answered)] = True
    return Sequences(batch.prompt, batch.prompt_mask, response, mask)


def answer(
    run, model, batch, counted, warp, key, with_greedy=False, with_states=False
) -> Sequences:
    """The answers of a batch; of rows that are not `counted` [B] the mask stays empty.

    `Written`, with their states, if so asked.
    """
    options = run.build.generation(warp) | {"dtype": run.build.arithmetic(model)}
    ids, real = place((batch.prompt, batch.prompt_mask), batch_sharding(run.build.mesh))
    most = room(batch.prompt, batch.prompt_mask, PROMPTS) if run.build.ragged else None
    options |= {"with_greedy": with_greedy, "with_states": with_states}
    options |= {"ways": run.build.ways, "most": most}
    found = generate_shrinking(model.config, model.params, ids, real, key, **options)
    times = 1 + with_greedy
    answers = Sequences(
        prompt=np.tile(batch.prompt, (times, 1)),
        prompt_mask=np.tile(batch.prompt_mask, (times, 1)),
        response=np.asarray(found.tokens),
        response_mask=np.asarray(found.mask) & np.tile(counted, times)[:, None],
    )
    return answers if found.hidden is None else Written(**vars(answers), hidden=found.hidden)


def token_lists(batch: Sequences, real: int) -> list[list[int]]:
    """The ids of the first `real` responses, the end of sequence included."""
    pairs = zip(batch.response[:real], batch.response_mask[:real], strict=True)
    return [[int(i) for i in row[mask]] for row, mask in pairs]


def texts_of(run: Run, batches: Iterable[Answered]) -> list[str]:
    """The text of the responses of batches, row by row."""
    found = [ids for batch, real in batches for ids in token_lists(batch, real)]
    return run.build.tokenizer.decode_batch(found)


def in_batches(
    file: Path | None,
    batches: Sequence[tuple[Any, int]],
    work: Callable[[Any], list[dict[str, Any]]],
) -> Iterator[list[dict[str, Any]]]:
    """The rows that `work` makes of each batch, written to `file` (None: nowhere) batch by batch.

    `batches` says how many rows each gives. Those that an earlier start has written are read, as
    many as make whole batches.

    Raises:
        Stopped: the run was asked to end between two batches.
    """
    if file is None:
        for batch, _ in batches:
            stopping.check()
            yield work(batch)
        return
    kept = read_rows(file, until_damage=True)
    there = hosts.least(len(kept))  # a process may see less of a file than the one that wrote it
    total, ends = sum(real for _, real in batches), np.cumsum([real for _, real in batches])
    first = int(np.searchsorted(ends, there, side="right"))
    begin = int(ends[first - 1]) if first else 0
    hosts.barrier(f"all have read {file.name}")
    write_rows(file, kept[:begin])
    with RowLog(file) as log:
        for index, (batch, real) in enumerate(batches):
            end = int(ends[index])
            if index < first:
                yield kept[end - real : end]
                continue
            stopping.check(f"{end - real} of {total} rows are kept in {file}")
            rows = [jsonable(row) for row in work(batch)]  # numbers as they will be read again
            log.append(*rows)
            yield rows


def teacher_answers(run: Run) -> Outcome:
    """The teacher answers the prompts; rows with text and exact token ids.

    Those of every split, or of the training split alone where the data has answers itself.
    """
    c = run.build.config.answers
    splits = SPLITS if c.source == "teacher" else ("train",)
    asked = {split: run.build.data.prompts(split) for split in splits}
    asked["train"] = asked["train"][: c.limit or None]
    batches = []
    for number, (split, prompts) in enumerate(asked.items()):
        key = jax.random.key(run.build.seed * len(SPLITS) + number)
        done = 0
        for index, (batch, real) in enumerate(run.build.data.ordered(prompts, c.batch_size)):
            here = split, prompts[done : done + real], batch, jax.random.fold_in(key, index)
            batches.append((here, real))
            done += real

    def work(here):
        split, prompts, batch, key = here
        counted = np.arange(len(batch.prompt)) < len(prompts)
        # p as it is: its temperature is that of `config.teacher`.
        answers = answer(run, run.build.teacher, batch, counted, Warp(), key)
        found = token_lists(answers, len(prompts))
        source = run.build.data.rows(split)
        return [
            {
                "split": split,
                "instruction": source[example.row].instruction,
                "input": source[example.row].input,
                "output": text.strip(),
                "tokens": ids,
            }
            for example, ids, text in zip(
                prompts, found, run.build.tokenizer.decode_batch(found), strict=True
            )
        ]

    done = tokens = 0
    file = run.folder("teacher_answers") / "answers.jsonl"
    with Progress("teacher_answers", sum(map(len, asked.values()))) as bar:
        for rows in in_batches(file, batches, work):
            run.keep(every=PUSHED_EVERY)
            done += len(rows)
            written = sum(len(row["tokens"]) for row in rows)
            tokens += written
            bar.update(done, tokens=written)
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
