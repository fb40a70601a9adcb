"""Supervised fine-tuning: -log q(y_t | y_<t, x) of given responses, a mean over tokens.

No teacher at training time: on the teacher's own answers this is SeqKD (Kim & Rush 2016).
"""

import jax
import optax

from minillm_jax.methods import Method
from minillm_jax.methods.accumulate import gradients
from minillm_jax.models import DecoderConfig, head, logits
from minillm_jax.objectives import reduce, token
from minillm_jax.rollout import response_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences


def negative_log_likelihood(
    config: DecoderConfig, params: Params, batch: Sequences, *, vocab: int, dtype: str
) -> jax.Array:
    """-log q(y_t) [B, N] of the responses, over the first `vocab` ids; arbitrary in padding."""
    hidden = response_states(config, params, batch, dtype=dtype)
    scores = logits(head(config, params), hidden)[..., :vocab]
    return token.cross_entropy(scores, batch.response)


def method(
    config: DecoderConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    vocab: int,
    micro_batches: int = 1,
    dtype: str = "float32",
) -> Method:
    """SFT of a student; `frozen` is not used."""

    def loss_sums(params: Params, batch: Sequences) -> dict[str, reduce.Pair]:
        nll = negative_log_likelihood(config, params, batch, vocab=vocab, dtype=dtype)
        return {"loss": reduce.total(nll, batch.response_mask)}

    def update(state: TrainState, frozen: None, batch: Sequences):
        grads, metrics = gradients(loss_sums, state.params, batch, micro_batches)
        rate = learning_rate(state.step - state.skipped)
        state, more = state.apply_gradients(optimizer, grads, metrics["loss"])
        return state, metrics | more | {"learning_rate": rate}

    return Method(update=jax.jit(update, donate_argnames="state"))
