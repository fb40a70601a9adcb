"""The stages that train a model: resume or start, run the loop, keep the best one."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax import assemble, hosts, stopping, trainer
from minillm_jax.build import Builder
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.geometry import in_words
from minillm_jax.methods import Method
from minillm_jax.methods.accumulate import spread
from minillm_jax.modelfiles import Model
from minillm_jax.models import DecoderConfig, with_temperature
from minillm_jax.reporting.progress import Progress
from minillm_jax.sharding import batch_sharding, place, take_rows
from minillm_jax.stages import Outcome, Run, own_settings
from minillm_jax.stages.answers import answered
from minillm_jax.stages.keeper import Keeper
from minillm_jax.stages.measures import Scores, validation
from minillm_jax.stages.selftest import self_test
from minillm_jax.stages.targets import with_targets
from minillm_jax.train_state import init_state
from minillm_jax.types import Params


@dataclass(frozen=True)
class Start:
    """The model that a stage trains; `load` reads its parameters, if no checkpoint takes over."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    load: Callable[[], Params]

    def at_temperature(self, temperature: float) -> "Start":
        """The same model with its logits divided by `temperature`."""
        if temperature == 1:
            return self
        load = lambda: with_temperature(self.config, self.load(), temperature)  # noqa: E731
        return replace(self, load=load)


def student(build: Builder, folder: Path | None = None) -> Start:
    """The student from `folder`, or as it is before training."""
    stored = build.open(folder) if folder else build.student_checkpoint
    return Start(stored.config, stored.hf_config, lambda: build.student(folder).params)


def train(
    run: Run,
    stage: str,
    method: Method,
    start: Start,
    *,
    section: str,
    frozen: Any,
    batches: Any,
    validate: Callable[[Model], Scores],
    headline: str,
    corpus: Any = None,
    tokens: float = float("inf"),
) -> Outcome:
    """Train `start` and leave the model that is best on the validation set in `run.model(stage)`.

    Best by what the section's `keep` says, of the scores that `validate` returns. Initialisation,
    in order: a checkpoint of this stage; else `start`. It ends once `tokens` have been read.
    """
    build = run.build
    schedule = build.schedule(section)
    optimizer, _ = build.optimizer(section)
    print(f"{stage}: {in_words(build, section, start.config)}", file=hosts.log())
    abstract = build.abstract_state(start.config, section, method.memory)
    rows = batch_sharding(build.mesh)
    settings = {"stage": stage, "config": own_settings(build.config.to_dict())}
    # A CPU has one memory: a copy for the writer would be a second state in it.
    writing = {"keep": 2, "background": jax.default_backend() != "cpu"}
    with Checkpoints(run.checkpoints(stage), settings, **writing) as checkpoints:
        buffer = None
        if checkpoints.latest_step() is not None:  # it is traced for its shapes, which takes time
            buffer = _abstract_rollout(build, method, abstract, frozen, batches)
        restored = checkpoints.restore(abstract, buffer=buffer)
        keep = f"valid_{build.config[section].keep}"
        progress = Keeper(run, stage, start, validate, keep, headline, checkpoints, section)
        if restored:
            state, rollout = restored.state, restored.buffer
            evaluated = progress.resume(restored)
        else:
            state, rollout = init_state(start.load(), optimizer, abstract, method.memory), None
            evaluated = False
        run.metrics.truncate(stage, progress.rows, int(state.step))
        first = int(state.step)
        with (
            saved_at_a_stop(checkpoints),
            Progress(stage, schedule.steps, headline=headline, start=first) as bar,
        ):
            progress.bar = bar
            state = trainer.fit(
                method,
                state,
                frozen,
                batches,
                schedule,
                trainer.Hooks(
                    progress.log, progress.evaluate, progress.save, progress.keep_skipped
                ),
                seed=build.seed,
                rollout=rollout,
                tokens=tokens,
                spent=progress.tokens,
                evaluated=evaluated,
                corpus=corpus,
                put=lambda batch: place(batch, rows),
                take=lambda rollout, which: take_rows(rollout, which, rows),
                arrange=_arrange(build, section),
            )
    if progress.best:
        scores = [f"{name} {x:.4g}" for name, x in progress.best.items() if name != "step"]
        of = f"update {progress.best['step']}, {', '.join(scores)}"
        print(f"{stage}: kept the model of {of}", file=hosts.log())
    outcome = {"tokens": progress.tokens, "updates": int(state.step)}
    outcome |= {"skipped": int(state.skipped), "warnings": progress.warnings}
    return outcome | {"best": progress.best}


@contextlib.contextmanager
def saved_at_a_stop(checkpoints: Checkpoints) -> Iterator[None]:
    """Let a run that was asked to end say so only when its state is on disk.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except stopping.Stopped:
        checkpoints.wait()
        raise


def _arrange(build: Builder, section: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """Rows of like length into one micro-batch, where it is read no further than they reach.

    Not if the student may write to the given prompts in the update: draws belong to places.
    """
    parts, d = build.micro_batches(section), build.config.distill
    writes = section == "distill" and (d.on_policy or d.replay)
    if parts == 1 or len(build.windows) == 1 or writes:
        return None
    return partial(spread, micro_batches=parts)


def _abstract_rollout(build, method, abstract, frozen, batches):
    """Shapes and shardings of a collection, to restore one; None for methods that collect none."""
    if method.collect is None:
        return None
    shapes = jax.eval_shape(method.collect, abstract.params, frozen, batches[0], jax.random.key(0))
    rows = batch_sharding(build.mesh)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), shapes)


def teacher_sft(run: Run) -> Outcome:
    """Fine-tune the teacher on the answers of the data."""
    stored = run.build.teacher_checkpoint
    start = Start(stored.config, stored.hf_config, lambda: run.build.untuned_teacher().params)
    return fine_tune(run, "teacher_sft", start, section="teacher_sft", source="data")


def student_sft(run: Run) -> Outcome:
    """Fine-tune the student on the answers of the teacher, or of the data."""
    return fine_tune(run, "student_sft", student(run.build))


def fine_tune(
    run: Run,
    stage: str,
    start: Start,
    *,
    section: str = "sft",
    source: str = "",
    tokens: float = float("inf"),
) -> Outcome:
    """SFT of `start` as that stage, on answers from `source` (empty: the experiment's).

    It reads at most `tokens`.
    """
    build = run.build
    keep = build.config[section].keep
    batch_size = build.config[section].batch_size
    return train(
        run,
        stage,
        assemble.supervised(build, start.config, section),
        start,
        section=section,
        frozen=None,
        batches=build.data.batches(answered(run, "train", source), batch_size),
        validate=lambda model: validation(run, model, {"loss", keep}, source),
        headline="loss",
        tokens=tokens,
    )


def distill(
    run: Run,
    stage: str = "distill",
    *,
    method: Method | None = None,
    tokens: float = float("inf"),
) -> Outcome:
    """The experiment's method, into the student that it starts from.

    MiniLLM gets prompts and validates by the reverse KL, the others get prompts with answers and
    validate by the loss of given ones, beside what `keep` says.

    Args:
        method: another than the experiment's, for the same data and schedule.
        tokens: read at most so many.
    """
    build, outline = run.build, run.build.outline
    c, collects = build.config.distill, outline.policy_gradient
    if collects:
        examples, size = build.data.prompts("train"), c.rollouts
    else:
        examples, size = answered(run, "train", outline.given), c.batch_size
    checked = self_test(run, answered(run, "train")) if outline.needs_teacher else {}
    batches = build.data.batches(examples, size)
    after_sft = outline.entry.start == "sft" and not outline.fine_tuned_student
    headline = "reverse_kl" if collects else "loss"
    start = student(build, run.model("student_sft") if after_sft else None)
    outcome = train(
        run,
        stage,
        method or assemble.distill(build),
        start.at_temperature(c.start_temperature),
        section="distill",
        frozen=build.teacher.params if outline.needs_teacher else None,
        batches=with_targets(run, batches) if outline.caches else batches,
        corpus=build.data.corpus(lambda: answered(run, "train")) if collects else None,
        validate=lambda model: validation(run, model, {headline, c.keep}),
        headline=headline,
        tokens=tokens,
    )
    return outcome | checked
