"""Word-level knowledge distillation on given answers (Hinton et al. 2015; Sanh et al. 2019).

    L = (1 - k) (-log q(y_t | y_<t, x)) + k (-sum_v p(v | y_<t, x) log q(v | y_<t, x))

a mean over the tokens of the answers, k = `kd_ratio` (0.5 in the reference). On the data set's own
answers this is the paper's KD baseline. On answers that the teacher wrote it is the reference
code's SeqKD; the SeqKD of Kim & Rush (2016) is `sft` on those.
"""

from typing import Any

import optax

from minillm_jax.methods import Method, compiled, cross_entropy
from minillm_jax.methods.accumulate import dropout_keys, gradients
from minillm_jax.models import DecoderConfig
from minillm_jax.objectives import reduce
from minillm_jax.rollout import response_states, teacher_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences


def method(
    student: DecoderConfig,
    teacher: DecoderConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    vocab: int,
    kd_ratio: float,
    micro_batches: int = 1,
    dtype: str = "float32",
    shardings: Any = None,
    remat: str = "none",
    teacher_dtype: str = "float32",
    dropout_seed: int | None = None,
    max_tokens: int | None = None,
) -> Method:
    """KD with `frozen` the teacher's parameters; the first `vocab` ids are true in both models.

    Args:
        dtype, teacher_dtype: of the arithmetic of the two models.
        shardings: of the state, for `compiled`.
        remat: what the student's backward pass computes again: `hidden_states`.
        dropout_seed: train with the student's dropout, its keys from this seed; None: without.
            The teacher has none.
        max_tokens: of a prompt and its response together, where that is less than their slots.

    Raises:
        InputError: `kd_ratio` outside [0, 1].
    """
    cross_entropy.check_kd_ratio(kd_ratio)

    def loss_sums(params: Params, frozen: Params, batch: Any) -> dict[str, reduce.Pair]:
        given, keys = batch
        key = None if keys is None else keys[0]
        options = {"dtype": dtype, "remat": remat, "dropout_key": key, "max_tokens": max_tokens}
        states = None
        if kd_ratio > 0:
            own = {"dtype": teacher_dtype, "max_tokens": max_tokens}
            states = teacher_states(teacher, frozen, given, **own)
        return cross_entropy.sums(
            student,
            params,
            response_states(student, params, given, **options),
            given.response,
            given.response_mask,
            size=vocab,
            kd_ratio=kd_ratio,
            teacher=teacher,
            teacher_params=frozen,
            teacher_hidden=states,
        )

    def update(state: TrainState, frozen: Params, batch: Sequences):
        keys = dropout_keys(dropout_seed, state.step, micro_batches)
        grads, metrics = gradients(
            lambda params, micro: loss_sums(params, frozen, micro),
            state.params,
            (batch, keys),
            micro_batches,
        )
        rate = learning_rate(state.step - state.skipped)
        state, more = state.apply_gradients(optimizer, grads, metrics["loss"])
        return state, metrics | more | {"learning_rate": rate}

    return Method(update=compiled(update, shardings))
