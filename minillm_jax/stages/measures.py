"""What a model scores: the loss of given answers, and divergences on answers of its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minillm_jax.build import Model
from minillm_jax.data.examples import Example
from minillm_jax.evaluation import divergence
from minillm_jax.evaluation.divergence import per_token, stack
from minillm_jax.rollout import Warp
from minillm_jax.stages import Run
from minillm_jax.stages.answers import respond

SAMPLED = Warp()


def answer_loss(run: Run, examples: Sequence[Example], model: Model) -> float:
    """NLL per token of the teacher's answers."""
    total = tokens = 0.0
    for batch, real in run.build.ordered(examples):
        nll = divergence.answer_nll(model.config, model.params, batch, run.build.vocab)
        total += float(np.asarray(nll)[:real].sum())
        tokens += float(batch.response_mask[:real].sum())
    return total / max(tokens, 1)


def sampled_reverse_kl(run: Run, model: Model) -> float:
    """KL[q || p] per token on samples of the student for validation prompts, always one key."""
    prompts = run.build.prompts("validation")
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
