"""Generation from one model: the decode loop of evaluation, teacher answers and chat."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.models import DecoderConfig, extend, head, init_cache, logits, unstack
from minillm_jax.rollout.warp import Warp, best, choose, warped
from minillm_jax.types import Params


@flax.struct.dataclass
class Response:
    """Generated ids [B, N], right-padded, and their mask up to the first end of sequence."""

    tokens: jax.Array
    mask: jax.Array


@partial(
    jax.jit,
    static_argnames=(
        "config",
        "slots",
        "warp",
        "eos_id",
        "pad_id",
        "vocab",
        "dtype",
        "with_greedy",
    ),
)
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
    with_greedy: bool = False,
    dtype: str | None = None,
) -> Response:
    """Answers of up to `slots` tokens, one loop on the device that ends when every row has ended.

    The same key gives the same tokens whatever the batch is padded to; `vocab` is the number of
    true ids, those beyond it are never drawn. The n-gram ban looks at prompt and response, as the
    paper's evaluation does, but not at padding. `with_greedy` gives 2 B rows, those B and then the
    greedy answers to the same prompts, which are read once: one program, and a decoding step reads
    its weights once for both. `dtype` is that of arithmetic and cache, by default the parameters'.
    """
    rows, width = prompt.shape
    kind: Any = dtype or params["embed"]["tokens"].dtype
    weights = unstack(config, params, kind)
    top = head(config, weights.outer)
    uniforms = jax.random.uniform(key, (rows, slots)).T  # whatever rows fill the batch
    cache = init_cache(config, rows, width + slots, kind)
    hidden, cache = extend(config, weights, prompt, prompt_mask, cache, dtype=kind)
    hidden = hidden[:, -1]
    if with_greedy:
        # Every leaf has the rows on axis 0, but for the index that they share.
        prompt, prompt_mask, hidden, cache = jax.tree.map(
            lambda x: jnp.concatenate([x, x]) if x.ndim else x,
            (prompt, prompt_mask, hidden, cache),
        )
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
        token = choose(warp, scores[:rows], uniforms[t])
        if with_greedy:
            token = jnp.concatenate([token, best(scores[rows:])])
        token = jnp.where(done, pad_id, token)
        history = jax.lax.dynamic_update_slice(history, token[:, None], (0, width + t))
        mask = jax.lax.dynamic_update_slice(mask, ~done[:, None], (0, t))
        done = done | (token == eos_id)
        here = jnp.ones_like(done)[:, None]
        hidden, cache = extend(config, weights, token[:, None], here, cache, dtype=kind)
        return t + 1, done, hidden[:, 0], cache, history, mask

    start = (
        jnp.int32(0),
        ~prompt_mask.any(axis=1),  # rows that only fill the batch
        hidden,
        cache,
        history,
        jnp.zeros((len(prompt), slots), bool),
    )
    _, _, _, _, history, mask = jax.lax.while_loop(unfinished, step, start)
    tokens = jnp.where(mask, history[:, width:], pad_id)
    return Response(tokens=tokens, mask=mask)
