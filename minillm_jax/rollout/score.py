"""Teacher-forced reading of given responses: the hidden states that predict their tokens."""

import jax
import jax.numpy as jnp

from minillm_jax.models import DecoderConfig, hidden_states
from minillm_jax.types import Params, Sequences


def response_states(
    config: DecoderConfig, params: Params, sequences: Sequences, **options
) -> jax.Array:
    """Hidden states [B, N, D] that predict the response tokens, from one pass over [B, P + N].

    `options` are those of `hidden_states`: dtype, remat, dropout_key.
    """
    tokens = jnp.concatenate([sequences.prompt, sequences.response], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.response_mask], axis=1)
    hidden = hidden_states(config, params, tokens, mask, **options)
    return hidden[:, sequences.prompt.shape[1] - 1 : -1]
