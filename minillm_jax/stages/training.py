"""The stages that train the student: resume or start, run the loop, keep the best student."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from minillm_jax import modelfiles, trainer
from minillm_jax.build import Model
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.methods import Method
from minillm_jax.models import abstract_params, logical_axes
from minillm_jax.reporting.progress import Progress
from minillm_jax.sharding import batch_sharding
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import answered
from minillm_jax.stages.measures import answer_loss, sampled_reverse_kl
from minillm_jax.train_state import abstract_state, init_state


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
        # Logging may change between two starts; whatever decides a state may not.
        config = {name: v for name, v in build.config.to_dict().items() if name != "tensorboard"}
        settings = {"stage": stage, "config": config}
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
            with Progress(stage, schedule.steps, headline=headline, start=first) as bar:
                progress.bar = bar
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
        self.tokens, self.best = 0, None
        self.bar: Progress | None = None
        self.began = time.monotonic()

    def log(self, step, values):
        self.tokens += int(values["tokens"])
        self.run.metrics.write(self.stage, step, time.monotonic() - self.began, values)
        if self.bar:
            self.bar.update(step, tokens=values["tokens"], metrics=values)

    def evaluate(self, step, state):
        model = Model(self.start.config, state.params, self.start.hf_config)
        value = self.validate(model)
        seconds = time.monotonic() - self.began
        self.run.metrics.write(self.stage, step, seconds, {self.score: value})
        # The first student is kept whatever its score, so that there always is one.
        best = math.inf if self.best is None else self.best[self.score]
        if self.best is None or value < best or math.isnan(best):
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
    return fine_tune(run, "student_sft", run.build.student())


def fine_tune(run: Run, stage: str, start: Model, seconds: float = float("inf")) -> Outcome:
    """SFT of `start` on the teacher's answers, as a stage of that name."""
    build = run.build
    return train(
        run,
        stage,
        build.sft(),
        start,
        section="sft",
        frozen=None,
        batches=build.batches(answered(run, "train"), build.config.sft.batch_size),
        validate=functools.partial(answer_loss, run, answered(run, "validation")),
        score="valid_loss",
        headline="loss",
        seconds=seconds,
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
