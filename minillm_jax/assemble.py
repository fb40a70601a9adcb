"""A method made of an experiment: its models, optimizer, data and settings put together.

One function per `kind` of `methods.registry`; `distill` is the one that the config names. A method
that no file in `methods/` does yet is a file there and a function here.
"""

from typing import Any

from minillm_jax import recipe
from minillm_jax.build import Builder
from minillm_jax.methods import Method, divergence, minillm, sft
from minillm_jax.methods.corpus import CorpusLoss
from minillm_jax.methods.on_policy import OnPolicy, Replay
from minillm_jax.models import DecoderConfig
from minillm_jax.objectives import divergences
from minillm_jax.objectives.taid import Schedule
from minillm_jax.rollout import Mixing
from minillm_jax.train_state import state_shardings


def distill(build: Builder) -> Method:
    """The method of the stage `distill`."""
    kind = build.outline.entry.kind
    if not build.outline.needs_teacher:
        return supervised(build, name="distill")
    return {"divergence": by_divergence, "minillm": policy_gradient}[kind](build)


def supervised(build: Builder, model: DecoderConfig | None = None, name: str = "sft") -> Method:
    """Supervised fine-tuning of the student, or of another model."""
    model = model or build.student_checkpoint.config
    return sft.method(
        model,
        *build.optimizer(name),
        vocab=build.vocab,
        dropout_seed=_dropout_seed(build),
        **_common(build, model, name),
    )


def by_divergence(build: Builder) -> Method:
    """Any divergence, on given answers or the student's own."""
    c, data, steps = build.config.distill, build.config.data, build.schedule("distill").steps
    on_policy = OnPolicy(
        share=c.on_policy,
        slots=data.max_response,
        eos_id=build.tokenizer.eos_id,
        pad_id=build.tokenizer.pad_id,
        vocab=build.vocab,
        dtype=build.config.student.dtype,
        replay=Replay(c.replay, steps) if c.replay else None,
    )
    between = divergences.find(c.divergence)
    start = between.checked(c.divergence, c.parameter)
    taid = Schedule(steps, start) if between.scheduled else None
    memory = divergence.remembered(on_policy, taid, data.max_prompt, build.answer_slots())
    return divergence.method(
        *_models(build),
        *build.optimizer("distill"),
        divergence=c.divergence,
        parameter=c.parameter,
        kd_ratio=c.kd_ratio,
        on_policy=on_policy,
        taid=taid,
        memory=memory,
        seed=build.seed,
        teacher_dtype=build.config.teacher.dtype,
        dropout_seed=_dropout_seed(build),
        **_common(build, build.student_checkpoint.config, "distill", memory),
    )


def policy_gradient(build: Builder) -> Method:
    """MiniLLM."""
    c = build.config.corpus
    return minillm.method(
        *_models(build),
        *build.optimizer("distill"),
        policy=recipe.policy(build.section("distill")),
        mixing=mixing(build),
        collect_batch=build.config.distill.collect_batch,
        corpus=CorpusLoss(c.coefficient, c.kd_ratio) if c.files and c.coefficient else None,
        **_common(build, build.student_checkpoint.config, "distill"),
    )


def mixing(build: Builder) -> Mixing:
    """Teacher-mixed sampling."""
    c = build.config.distill
    return Mixing(
        slots=build.config.data.max_response,
        alpha=c.alpha,
        chunk=c.chunk,
        eos_id=build.tokenizer.eos_id,
        pad_id=build.tokenizer.pad_id,
        vocab=build.vocab,
        dtype=build.config.student.dtype,
    )


def _dropout_seed(build: Builder) -> int | None:
    return build.seed if build.config.dropout else None  # of the models' own dropout


def _models(build: Builder) -> tuple[DecoderConfig, DecoderConfig]:
    return build.student_checkpoint.config, build.teacher_config


def _common(build: Builder, model: DecoderConfig, name: str, memory: Any = ()) -> dict[str, Any]:
    return {
        "micro_batches": build.micro_batches(name),
        "dtype": build.config.student.dtype,
        "remat": build.section(name)["remat"],
        "windows": build.windows,
        "ragged": build.ragged,
        "shardings": state_shardings(build.abstract_state(model, name, memory)),
    }
