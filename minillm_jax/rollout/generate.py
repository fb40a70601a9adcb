"""Generation from one model: the decode loop of evaluation, teacher answers and chat."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.models import DecoderConfig, extend, head, init_cache, logits, unstack
from minillm_jax.rollout.warp import Warp, choose, warped
from minillm_jax.types import Params


@flax.struct.dataclass
class Response:
    """Generated ids [B, N], right-padded, and their mask up to the first end of sequence."""

    tokens: jax.Array
    mask: jax.Array


@partial(jax.jit, static_argnames=("config", "slots", "warp", "eos_id", "pad_id", "vocab", "dtype"))
def generate(
    config: DecoderConfig,
    params: Params,
    prompt: jax.Array,  # [B, P]
    prompt_mask: jax.Array,  # [B, P]
    key: jax.Array,
    *,
    slots: int,
    warp: Warp,
    eos_id: int,
    pad_id: int,
    vocab: int,
    greedy: jax.Array | None = None,  # [B] bool
    dtype: str | None = None,
) -> Response:
    """Answers of up to `slots` tokens, one loop on the device that ends when every row has ended.

    The same key gives the same tokens whatever the batch is padded to; `vocab` is the number of
    true ids, those beyond it are never drawn. The n-gram ban looks at prompt and response, as the
    paper's evaluation does, but not at padding. Rows in `greedy` take the best id at every step, so
    that one program and one loop give sampled and greedy answers. `dtype` is that of arithmetic and
    cache, by default the parameters'.
    """
    rows, width = prompt.shape
    weights = unstack(config, params)
    top = head(config, params)
    uniforms = jax.random.uniform(key, (slots, rows))
    kind: Any = dtype or params["embed"]["tokens"].dtype
    cache = init_cache(config, rows, width + slots, kind)
    hidden, cache = extend(config, weights, prompt, prompt_mask, cache, dtype=kind)
    # Left padding is given ids of its own, so that it never completes an n-gram.
    history = jnp.where(prompt_mask, prompt, -1 - jnp.arange(width)[None])
    history = jnp.pad(history, ((0, 0), (0, slots)))

    def unfinished(loop):
        t, done = loop[0], loop[1]
        return (t < slots) & ~jnp.all(done)

    def step(loop):
        t, done, hidden, cache, history, mask = loop
        scores = logits(top, hidden)[:, :vocab]
        scores = warped(warp, scores, history, width + t)
        token = jnp.where(done, pad_id, choose(warp, scores, uniforms[t], greedy))
        history = jax.lax.dynamic_update_slice(history, token[:, None], (0, width + t))
        mask = jax.lax.dynamic_update_slice(mask, ~done[:, None], (0, t))
        done = done | (token == eos_id)
        here = jnp.ones((rows, 1), bool)
        hidden, cache = extend(config, weights, token[:, None], here, cache, dtype=kind)
        return t + 1, done, hidden[:, 0], cache, history, mask

    start = (
        jnp.int32(0),
        ~prompt_mask.any(axis=1),  # rows that only fill the batch
        hidden[:, -1],
        cache,
        history,
        jnp.zeros((rows, slots), bool),
    )
    _, _, _, _, history, mask = jax.lax.while_loop(unfinished, step, start)
    tokens = jnp.where(mask, history[:, width:], pad_id)
    return Response(tokens=tokens, mask=mask)
