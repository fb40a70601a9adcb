"""The hidden states that predict the tokens of given responses: read now, or kept before."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.models import DecoderConfig, hidden_states
from minillm_jax.models.ragged import room
from minillm_jax.types import Array, Params, Sequences


@flax.struct.dataclass
class Taught(Sequences):
    """Given responses with the teacher's hidden states that predict them, read before."""

    teacher_hidden: Array  # [B, N, Dp]


@flax.struct.dataclass
class Written(Sequences):
    """Responses with the states of the model that wrote them, from its decoding."""

    hidden: Array  # [B, N, E]


def own_states(config: DecoderConfig, params: Params, sequences: Sequences, **options) -> jax.Array:
    """`response_states` of the model that wrote `sequences`: those from then, or read now."""
    if isinstance(sequences, Written):
        return jnp.asarray(sequences.hidden)
    return response_states(config, params, sequences, **options)


def teacher_states(
    config: DecoderConfig, params: Params, sequences: Sequences, **options
) -> jax.Array:
    """`response_states` of the teacher: those that come with the batch, or read now."""
    if isinstance(sequences, Taught):
        return jnp.asarray(sequences.teacher_hidden)
    return response_states(config, params, sequences, **options)


def most_tokens(
    sequences: Sequences, shares: Sequence[float], micro_batches: int = 1
) -> int | None:
    """`most` for `response_states` of these rows, or of each micro-batch of them: `ragged.room`."""
    pair = sequences.prompt, sequences.response
    masks = sequences.prompt_mask, sequences.response_mask
    tokens, mask = (np.concatenate(jax.device_get(x), axis=1) for x in (pair, masks))
    return room(tokens, mask, shares, micro_batches)


def response_states(
    config: DecoderConfig,
    params: Params,
    sequences: Sequences,
    *,
    max_tokens: int | None = None,
    **options,
) -> jax.Array:
    """Hidden states [B, N, D] that predict the response tokens, from one pass over [B, P + N].

    With `max_tokens`, the most that a prompt and its response have together, the pass is over
    [B, max_tokens] where that is less: each row is read from its first token on. What comes back is
    the same. `options` are those of `hidden_states`: dtype, remat, dropout_key, most.
    """
    tokens = jnp.concatenate([sequences.prompt, sequences.response], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.response_mask], axis=1)
    first, slots = sequences.prompt.shape[1] - 1, tokens.shape[1]  # `first` predicts token 0
    if max_tokens is None or max_tokens >= slots:
        return hidden_states(config, params, tokens, mask, **options)[:, first:-1]
    padding = first + 1 - sequences.prompt_mask.sum(axis=1, keepdims=True)  # [B, 1], on the left
    start = jnp.minimum(padding, slots - max_tokens)
    read = start + jnp.arange(max_tokens)[None]  # [B, max_tokens]
    tokens, mask = (jnp.take_along_axis(x, read, axis=1) for x in (tokens, mask))
    hidden = hidden_states(config, params, tokens, mask, **options)
    # Slots beyond the window are padding of the response: any state will do.
    wanted = first - start + jnp.arange(sequences.response.shape[1])[None]  # [B, N]
    wanted = jnp.clip(wanted, 0, max_tokens - 1)
    return jnp.take_along_axis(hidden, wanted[..., None], axis=1)
