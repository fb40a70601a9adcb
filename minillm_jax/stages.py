"""What each stage of an experiment does; `pipeline` decides which of them run.

A stage reads the outputs of earlier stages from the work directory and writes its own there, so
that it can be run alone. It returns what `done.json` says of it: seconds, tokens, updates.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax import modelfiles, trainer
from minillm_jax.build import SPLITS, Builder, Model
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.evaluation import divergence
from minillm_jax.evaluation.divergence import per_token, stack
from minillm_jax.evaluation.text import describe, distinct_n, loops, repetition
from minillm_jax.evaluation.rouge import mean_rouge_l
from minillm_jax.methods import Method
from minillm_jax.models import abstract_params, logical_axes
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.writers import MetricsWriter, read_rows, write_json, write_rows
from minillm_jax.rollout import Warp, generate
from minillm_jax.sharding import batch_sharding
from minillm_jax.train_state import abstract_state, init_state
from minillm_jax.types import Sequences

Outcome = dict[str, float]
GREEDY = Warp(temperature=0.0)
SAMPLED = Warp()


@dataclass(frozen=True)
class Run:
    """One experiment in its work directory."""

    build: Builder
    workdir: Path
    metrics: MetricsWriter

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its outputs."""
        return self.workdir / "stages" / stage

    def model(self, stage: str) -> Path:
        """The student that a training stage has chosen, in the Hugging Face layout."""
        return self.folder(stage) / "model"


# Generation.


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
        yield batch.replace(response=np.asarray(answer.tokens), response_mask=mask), real


def token_lists(batch: Sequences, real: int) -> list[list[int]]:
    """The ids of the first `real` responses, the end of sequence included."""
    pairs = zip(batch.response[:real], batch.response_mask[:real], strict=True)
    return [[int(i) for i in row[mask]] for row, mask in pairs]


def teacher_answers(run: Run) -> Outcome:
    """The teacher answers the prompts of every split; rows with text and exact token ids."""
    c = run.build.config.answers
    warp = Warp(temperature=c.temperature, top_p=c.top_p)
    rows, tokens = [], 0
    total = sum(len(run.build.prompts(split)) for split in SPLITS)
    with Progress("teacher_answers", total) as bar:
        for number, split in enumerate(SPLITS):
            source, prompts = run.build.rows(split), run.build.prompts(split)
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
        for prompt, row in zip(run.build.prompts(split), found, strict=True)
    ]


# Training.


def train(
    run: Run,
    stage: str,
    method: Method,
    start: Model,
    *,
    section: str,
    frozen: Any,
    batches: Any,
    validate: Callable[[Model], float],
    score: str,
    headline: str,
    seconds: float = float("inf"),
) -> Outcome:
    """Train `start` and leave the student with the lowest validation `score` in `run.model(stage)`.

    Initialisation, in order: a checkpoint of this stage; else `start`.
    """
    build, folder = run.build, run.folder(stage)
    schedule = build.schedule(section)
    optimizer, _ = build.optimizer(section)
    axes = logical_axes(start.config)
    with jax.set_mesh(build.mesh):
        abstract = abstract_state(abstract_params(start.config), axes, optimizer, build.mesh)
        settings = {"stage": stage, "config": build.config.to_dict()}
        with Checkpoints(folder / "checkpoints", settings, keep=1) as checkpoints:
            buffer = _abstract_rollout(build, method, abstract, frozen, batches)
            restored = checkpoints.restore(abstract, buffer=buffer)
            rollout, tokens = None, 0
            if restored:
                state, rollout = restored.state, restored.buffer
                tokens = restored.extra["tokens"]
                best = restored.extra["best"]
                run.metrics.truncate_after(stage, restored.step)
            else:
                state, best = init_state(start.params, optimizer, abstract), None
                run.metrics.truncate_after(stage, -1)
            progress = _Stage(run, stage, start, schedule, validate, score, checkpoints)
            progress.tokens, progress.best = tokens, best
            first = int(state.step)
            with Progress(stage, schedule.steps, headline=headline, start=first) as progress.bar:
                if not restored:
                    progress.evaluate(0, state)
                state = trainer.fit(
                    method,
                    state,
                    frozen,
                    batches,
                    schedule,
                    trainer.Hooks(progress.log, progress.evaluate, progress.save),
                    seed=build.seed,
                    rollout=rollout,
                    seconds=seconds,
                )
    outcome = {"tokens": progress.tokens, "updates": int(state.step)}
    return outcome | {"skipped": int(state.skipped), "best": progress.best}


class _Stage:
    """The hooks of one training stage, and the little that they remember."""

    def __init__(self, run, stage, start, schedule, validate, score, checkpoints):
        self.run, self.stage, self.start, self.schedule = run, stage, start, schedule
        self.validate, self.score, self.checkpoints = validate, score, checkpoints
        self.tokens, self.best, self.bar = 0, None, None
        self.began = time.monotonic()

    def log(self, step, values):
        self.tokens += int(values["tokens"])
        self.run.metrics.write(self.stage, step, time.monotonic() - self.began, values)
        self.bar.update(step, tokens=values["tokens"], metrics=values)

    def evaluate(self, step, state):
        model = Model(self.start.config, state.params, self.start.hf_config)
        value = self.validate(model)
        seconds = time.monotonic() - self.began
        self.run.metrics.write(self.stage, step, seconds, {self.score: value})
        if self.best is None or value < self.best[self.score]:
            self.best = {"step": step, self.score: value}
            modelfiles.save_model(self.run.model(self.stage), model, self.run.build.tokenizer)

    def save(self, step, state, rollout):
        extra = {"tokens": self.tokens, "best": self.best}
        self.checkpoints.save(step, state, extra, buffer=rollout)


def _abstract_rollout(build, method, abstract, frozen, batches):
    """Shapes and shardings of a collection, to restore one; None for methods that collect none."""
    if method.collect is None:
        return None
    shapes = jax.eval_shape(method.collect, abstract.params, frozen, batches[0], jax.random.key(0))
    rows = batch_sharding(build.mesh)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), shapes)


def student_sft(run: Run) -> Outcome:
    """Fine-tune the student on the teacher's answers; the lowest validation loss is kept."""
    build = run.build
    return train(
        run,
        "student_sft",
        build.sft(),
        build.student(),
        section="sft",
        frozen=None,
        batches=build.batches(answered(run, "train"), build.config.sft.batch_size),
        validate=functools.partial(answer_loss, run, answered(run, "validation")),
        score="valid_loss",
        headline="loss",
    )


def distill(run: Run) -> Outcome:
    """MiniLLM from the fine-tuned student; the lowest validation reverse KL is kept."""
    build = run.build
    return train(
        run,
        "distill",
        build.minillm(),
        build.student(run.model("student_sft")),
        section="distill",
        frozen=build.teacher.params,
        batches=build.batches(build.prompts("train"), build.config.distill.rollouts),
        validate=functools.partial(sampled_reverse_kl, run),
        score="valid_reverse_kl",
        headline="reverse_kl",
    )


# Evaluation.


def answer_loss(run: Run, examples: Sequence[Example], model: Model) -> float:
    """NLL per token of the teacher's answers."""
    limit = run.build.config.evaluate.validation_prompts
    rows = measure(run, model, run.build.ordered(examples[:limit]))
    return -per_token(rows, "log_q")[0]


def sampled_reverse_kl(run: Run, model: Model) -> float:
    """KL[q || p] per token on samples of the student for validation prompts, the same key always."""
    limit = run.build.config.evaluate.validation_prompts
    prompts = run.build.prompts("validation")[:limit]
    return per_token(measure(run, model, respond(run, model, prompts, SAMPLED, 0)), "reverse_kl")[0]


def measure(run: Run, model: Model, batches: Any) -> dict[str, np.ndarray]:
    """Per-response sums of the divergences between `model` and the teacher on given responses."""
    teacher, parts = run.build.teacher, []
    for batch, real in batches:
        found = divergence.sums(
            model.config, teacher.config, model.params, teacher.params, batch, run.build.vocab
        )
        parts.append({name: np.asarray(value)[:real] for name, value in found.items()})
    return stack(parts)


def held_out(run: Run, model: Model) -> tuple[dict[str, Any], list[str]]:
    """Every held-out figure of one model, and its greedy answers.

    Sampled answers (temperature 1, the same key for every model) give the reverse KL and the text
    statistics; Rouge-L is against the teacher's own sampled answer; the NLL is that of that answer.
    """
    build = run.build
    limit = build.config.evaluate.prompts or None
    examples = answered(run, "test")[:limit]
    references = build.tokenizer.decode_batch([e.response for e in examples])
    eos = build.tokenizer.eos_id

    sampled = list(respond(run, model, examples, SAMPLED, build.seed))
    rows = measure(run, model, sampled)
    answers = [ids for batch, real in sampled for ids in token_lists(batch, real)]
    bare = [[i for i in ids if i != eos] for ids in answers]
    nll = -per_token(measure(run, model, build.ordered(examples)), "log_q")[0]

    greedy = [
        ids
        for batch, real in respond(run, model, examples, GREEDY, 0)
        for ids in token_lists(batch, real)
    ]
    greedy_bare = [[i for i in ids if i != eos] for ids in greedy]
    texts = [text.strip() for text in build.tokenizer.decode_batch(greedy)]
    sampled_texts = build.tokenizer.decode_batch(answers)
    reverse_kl, error = per_token(rows, "reverse_kl")
    figures = {
        "parameters": model.parameters,
        "reverse_kl": reverse_kl,
        "reverse_kl_stderr": error,
        "nll": nll,
        "entropy": per_token(rows, "entropy")[0],
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


__all__ = ["Row", "Run", "distill", "evaluate", "student_sft", "teacher_answers"]
