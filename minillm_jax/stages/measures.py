"""What a model scores: the loss of given answers, and divergences on answers of its own."""

from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from minillm_jax import hosts, stopping
from minillm_jax.data.examples import Example
from minillm_jax.evaluation import divergence
from minillm_jax.evaluation.divergence import per_token, stack
from minillm_jax.evaluation.rouge import mean_rouge_l
from minillm_jax.modelfiles import Model
from minillm_jax.models.ragged import SCORING
from minillm_jax.rollout import Warp, most_tokens
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Run
from minillm_jax.stages.answers import Measure, answered, references, sample, texts_of
from minillm_jax.types import Sequences

SAMPLED = Warp()
Scores = dict[str, float]


def answer_loss(run: Run, examples: Sequence[Example], model: Model) -> float:
    """NLL per token of the answers of `examples`."""
    total = tokens = 0.0
    for batch, real in run.build.data.ordered(examples):
        stopping.check()
        total += float(batch_nll(run, model, batch)[:real].sum())
        tokens += float(batch.response_mask[:real].sum())
    return total / max(tokens, 1)


def batch_nll(run: Run, model: Model, batch: Sequences) -> np.ndarray:
    """-log q summed over each given response of a batch, [B]."""
    nll = divergence.answer_nll(
        model.config,
        model.params,
        place(batch, batch_sharding(run.build.mesh)),
        run.build.vocab,
        run.build.arithmetic(model),
        run.build.data.max_tokens,
        most_tokens(batch, SCORING) if run.build.ragged else None,
    )
    return hosts.fetch(nll)


def validation(run: Run, model: Model, wanted: Set[str], source: str = "") -> Scores:
    """What `wanted` names, on the validation prompts: loss, rouge_l, reverse_kl.

    The loss is that of the answers of `source`; Rouge-L (against them) and the reverse KL are of
    answers that the model samples at temperature 1, always with one key.
    """
    scores: Scores = {}
    if "loss" in wanted:
        scores["loss"] = answer_loss(run, answered(run, "validation", source), model)
    wanted_kl = "reverse_kl" in wanted
    if wanted_kl or "rouge_l" in wanted:
        prompts = run.build.data.prompts("validation")
        found = sample(run, model, prompts, 0, measure=measuring(run, model) if wanted_kl else None)
        if found.measured:
            scores["reverse_kl"] = per_token(found.measured, "reverse_kl")[0]
        if "rouge_l" in wanted:
            texts = texts_of(run, found.sampled)
            scores["rouge_l"] = mean_rouge_l(texts, references(run, "validation", source))
    return scores


def measure(run: Run, model: Model, batches: Any, k: int = 0) -> dict[str, np.ndarray]:
    """Per-response sums of the divergences between `model` and the teacher on given responses.

    With `k` those of the overlap with the teacher's k likeliest ids, too.
    """
    one = measuring(run, model, k)
    return stack([one(batch, real) for batch, real in batches])


def measuring(run: Run, model: Model, k: int = 0) -> Measure:
    """`measure` for one batch after another; `Written` ones are those that `model` wrote."""
    teacher = run.build.teacher

    def one(batch: Sequences, real: int) -> dict[str, np.ndarray]:
        found = divergence.sums(
            model.config,
            teacher.config,
            model.params,
            teacher.params,
            place(batch, batch_sharding(run.build.mesh)),
            run.build.vocab,
            run.build.arithmetic(model),
            k,
            most_tokens(batch, SCORING) if run.build.ragged else None,
        )
        return {name: hosts.fetch(value)[:real] for name, value in found.items()}

    return one
