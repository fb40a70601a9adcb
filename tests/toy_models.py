"""Two small random decoders over the same few ids, far from uniform, for tests of any layer."""

import jax
import jax.numpy as jnp

from minillm_jax.models import DecoderConfig, head, init_params, logits
from minillm_jax.rollout import response_states


def toy(
    seed: int,
    *,
    vocab: int = 7,
    layers: int = 2,
    width: int = 16,
    kv_heads: int = 2,  # for four heads of queries
    sharpness: float = 1.0,
):
    """A decoder and its parameters; `sharpness` scales the logits up."""
    config = DecoderConfig(
        vocab_size=vocab,
        layers=layers,
        width=width,
        heads=4,
        kv_heads=kv_heads,
        mlp_width=2 * width,
        max_positions=256,
        gated=True,
        tied_head=False,
    )
    params = init_params(config, jax.random.key(seed))
    # Kernels at their init make all positions alike; spread them, so that context matters.
    params = jax.tree.map(lambda x: x * 12 if x.ndim > 2 else x, params)
    params["embed"]["tokens"] *= 40
    params["head"]["weight"] *= 30 * sharpness
    return config, params


def prompts(rows: int, width: int, vocab: int, seed: int = 0):
    """Left-padded prompts [B, P] of differing lengths and their mask; no id is 0, the toys' end."""
    key, other = jax.random.split(jax.random.key(seed))
    lengths = jax.random.randint(key, (rows, 1), 1, width + 1)
    mask = jnp.arange(width)[None] >= width - lengths
    return jnp.where(mask, jax.random.randint(other, (rows, width), 1, vocab), 0), mask


def full_logits(model, batch, vocab: int):
    """The logits [B, N, V] of the responses of a batch over the first `vocab` ids."""
    config, params = model
    return logits(head(config, params), response_states(config, params, batch))[..., :vocab]
