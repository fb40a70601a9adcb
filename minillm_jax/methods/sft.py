"""Supervised fine-tuning: -log q(y_t | y_<t, x) of given responses, a mean over tokens.

No teacher at training time: on the teacher's own answers this is SeqKD (Kim & Rush 2016).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import optax

from minillm_jax.methods import Method, compiled, cross_entropy
from minillm_jax.methods.accumulate import dropout_keys, gradients, lengths
from minillm_jax.models import DecoderConfig
from minillm_jax.models.ragged import UPDATES
from minillm_jax.objectives import reduce
from minillm_jax.rollout import most_tokens, response_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences


def method(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    vocab: int,
    micro_batches: int = 1,
    dtype: str = "float32",
    shardings: Any = None,
    remat: str = "none",
    dropout_seed: int | None = None,
    windows: Sequence[int] = (),
    ragged: bool = False,
) -> Method:
    """SFT of a student over its first `vocab` ids; `frozen` is not used.

    Args:
        dtype: of the arithmetic.
        shardings: of the state, for `compiled`.
        remat: what the backward pass computes again: `hidden_states`.
        dropout_seed: train with the model's dropout, its keys from this seed; None: without.
        windows: for the tokens of a prompt and its response together: `accumulate.gradients`.
        ragged: with no more than one window and no dropout, read each distinct token once:
            `models.ragged`.
    """
    short = len(windows) > 1

    def loss_sums(
        params: Params, batch: Any, window: int | None, most: int | None
    ) -> dict[str, reduce.Pair]:
        given, keys = batch
        key = None if keys is None else keys[0]
        options = {"dtype": dtype, "remat": remat, "dropout_key": key, "most": most}
        hidden = response_states(config, params, given, max_tokens=window, **options)
        labels, mask = given.response, given.response_mask
        found = cross_entropy.sums(config, params, hidden, labels, mask, size=vocab, short=short)
        return {"loss": found["loss"]}

    def update(state: TrainState, frozen: None, batch: Sequences, most: int | None = None):
        keys = dropout_keys(dropout_seed, state.step, micro_batches)
        cut = {"windows": windows, "tokens": lengths(batch)}
        sums = partial(loss_sums, most=most)
        grads, metrics = gradients(sums, state.params, (batch, keys), micro_batches, **cut)
        rate = learning_rate(state.step - state.skipped)
        state, more = state.apply_gradients(optimizer, grads, metrics["loss"])
        return state, metrics | more | {"learning_rate": rate}

    known = ragged and not short and dropout_seed is None
    told = partial(most_tokens, shares=UPDATES, micro_batches=micro_batches) if known else None
    return Method(update=compiled(update, shardings), most=told)
