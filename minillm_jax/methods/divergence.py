"""Distillation by any divergence between the models, on given answers or the student's own.

    L = (1 - k) (-log q(y_t)) + k D(p(. | y_<t), q(. | y_<t))

a mean over the tokens of the answers, k = `kd_ratio`; D is one of `objectives.divergences`. Who
wrote the answers is `OnPolicy`'s matter. So this one file is word-level KD (Hinton et al. 2015;
Sanh et al. 2019; D the cross-entropy, k = 0.5 in the reference), the reference's SeqKD (the same on
answers of the teacher), GKD, generalised JSD, on-policy distillation, skew KL, DistiLLM, total
variation, AKL and, with a `taid.Schedule`, TAID: which is which says `registry`.

1. `OnPolicy.source` gives the batch: the given one, or the student's own.
2. The teacher reads it, or its hidden states or cut distribution come with it, read before; per
   micro-batch the student reads it, and `vocab.loss_sum` meets both.
3. TAID's t, and DistiLLM's buffer, are remembered in `TrainState.memory`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minillm_jax.methods import Method, compiled, cross_entropy
from minillm_jax.methods.accumulate import dropout_keys, gradients, lengths
from minillm_jax.methods.on_policy import Buffer, OnPolicy
from minillm_jax.models import DecoderConfig, head
from minillm_jax.models.ragged import UPDATES
from minillm_jax.objectives import divergences, reduce, top_k, vocab
from minillm_jax.objectives.taid import Schedule
from minillm_jax.objectives.top_k import Cut
from minillm_jax.rollout import most_tokens, response_states, teacher_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences

LOGGED = ("divergence", "forward_kl", "reverse_kl", "entropy")


def method(
    student: DecoderConfig,
    teacher: DecoderConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    divergence: str,
    on_policy: OnPolicy,
    parameter: float | None = None,
    kd_ratio: float = 1.0,
    taid: Schedule | None = None,
    memory: Any = (),
    seed: int = 0,
    micro_batches: int = 1,
    dtype: str = "float32",
    shardings: Any = None,
    remat: str = "none",
    teacher_dtype: str = "float32",
    dropout_seed: int | None = None,
    windows: Sequence[int] = (),
    ragged: bool = False,
) -> Method:
    """The method with `frozen` the teacher's parameters.

    Args:
        divergence, parameter: a name of `DIVERGENCES` and its parameter, None for the default.
        taid: the schedule of the parameter, which then is t.
        memory: from `remembered`; the updates begin with it.
        seed: of the student's writing; the key of an update is fold_in(key(seed), step).
        dtype, teacher_dtype: of the arithmetic of the two models.
        shardings: of the state, for `compiled`.
        remat: what the student's backward pass computes again: `hidden_states`.
        dropout_seed: train with the student's dropout, its keys from this seed; None: without.
            The teacher has none.
        windows: for the tokens of a prompt and its response together: `accumulate.gradients`.
        ragged: with no more than one window, given answers alone and no dropout, read each distinct
            token once: `models.ragged`.

    Raises:
        InputError: no such divergence, a parameter or share that is none.
    """
    cross_entropy.check_kd_ratio(kd_ratio)
    found = divergences.find(divergence)
    fixed = None if taid else found.checked(divergence, parameter)
    short = len(windows) > 1

    def between(z_q: jax.Array, z_p: jax.Array, t: jax.Array) -> jax.Array:
        return found.function(z_q, z_p, t if taid else fixed)

    def between_cut(z_q: jax.Array, _: jax.Array, extras: Any) -> jax.Array:
        t, ids, log_p = extras
        return between(top_k.cut(z_q, ids), log_p, t)

    def apart(scores: vocab.Scores) -> jax.Array:
        if found.scored and "divergence" not in scores:
            return found.scored(scores)
        return scores["divergence"]

    def per_token(scores: vocab.Scores, extras: Any, mask: Any) -> jax.Array:
        if kd_ratio == 1:
            return apart(scores)
        return kd_ratio * apart(scores) - (1 - kd_ratio) * scores["log_q"]

    def loss_sums(
        params: Params, frozen: Params, batch: Any, window: int | None, most: int | None
    ) -> dict[str, reduce.Pair]:
        rows, keys, t = batch
        labels, mask = rows.response, rows.response_mask
        key = None if keys is None else keys[0]
        reads: dict[str, Any] = {"max_tokens": window, "most": most}
        options = {"dtype": dtype, "remat": remat, "dropout_key": key} | reads
        hidden = response_states(student, params, rows, **options)
        q, p, states = head(student, params, hidden.dtype), None, None
        extras: Any = t
        how: vocab.Divergence | None = None if found.scored else between
        if isinstance(rows, Cut):
            extras, how = (t, rows.ids, rows.log_p), between_cut
        else:
            own = {"dtype": teacher_dtype} | reads
            states = teacher_states(teacher, frozen, rows, **own)
            p = head(teacher, frozen, states.dtype)
        with jax.named_scope("vocabulary"):
            summed, scores = vocab.loss_sum(
                per_token,
                hidden,
                q.weight,
                q.bias,
                states,
                p.weight if p else None,
                p.bias if p else None,
                labels,
                mask,
                extras,
                divergence=how,
                vocab_size=on_policy.vocab,
                short=short,
            )
        scores["divergence"] = apart(scores)
        pairs = {name: reduce.total(scores[name], mask) for name in LOGGED if name in scores}
        pairs["nll"] = reduce.total(-scores["log_q"], mask)
        return pairs | {"loss": reduce.Pair(summed, pairs["nll"].count)}

    def update(state: TrainState, frozen: Params, given: Sequences, most: int | None = None):
        rows, buffer = given, None
        more: dict[str, Any] = {}
        if on_policy.writes:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            buffer = state.memory["replay"] if on_policy.replay else None
            rows, buffer, who = on_policy.source(
                student, state.params, buffer, given, key, state.step
            )
            more = _about(rows, who, buffer)
        t = state.memory["taid"].t if taid else jnp.float32(0)
        per_token = jnp.broadcast_to(t, rows.response.shape)
        keys = dropout_keys(dropout_seed, state.step, micro_batches)
        grads, metrics = gradients(
            lambda params, micro, window: loss_sums(params, frozen, micro, window, most),
            state.params,
            (rows, keys, per_token),
            micro_batches,
            windows=windows,
            tokens=lengths(rows),
        )
        memory = state.memory
        if buffer is not None:
            memory = memory | {"replay": buffer}
        if taid:
            progress = taid.advance(memory["taid"], metrics["divergence"], state.step)
            memory, more = memory | {"taid": progress}, more | {"t": t}
        more["learning_rate"] = learning_rate(state.step - state.skipped)
        state, taken = state.apply_gradients(optimizer, grads, metrics["loss"])
        return replace(state, memory=memory), metrics | more | taken

    observe = on_policy.replay.observe if on_policy.replay else None
    # What the student writes in the update is not known before.
    known = ragged and not short and not on_policy.writes and dropout_seed is None
    told = partial(most_tokens, shares=UPDATES, micro_batches=micro_batches) if known else None
    return Method(compiled(update, shardings), memory=memory, observe=observe, most=told)


def remembered(
    on_policy: OnPolicy, taid: Schedule | None, prompt_slots: int, response_slots: int
) -> Any:
    """What the method remembers before the first update: host arrays, or () for nothing."""
    memory: dict[str, Any] = {}
    if on_policy.replay:
        slots = prompt_slots, response_slots
        memory["replay"] = on_policy.replay.begin(on_policy.share, *slots, on_policy.pad_id)
    if taid:
        memory["taid"] = taid.begin()
    return memory or ()


def _about(rows: Sequences, who: jax.Array, buffer: Buffer | None) -> dict[str, Any]:
    """Metrics of what was read; "tokens" goes in the place of the given batch's."""
    mask = rows.response_mask
    told: dict[str, Any] = {
        "tokens": rows.prompt_mask.sum() + mask.sum(),
        "on_policy": (who > 0).astype(jnp.float32),
        "response_length": mask.sum() / jnp.maximum(mask.any(axis=1).sum(), 1),
    }
    return told if buffer is None else told | {"threshold": buffer.threshold}
