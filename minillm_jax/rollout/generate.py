"""Generation from one model: the decode loop of evaluation, teacher answers and chat."""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.models import (
    Cache,
    DecodeParams,
    DecoderConfig,
    extend,
    head,
    init_cache,
    logits,
    unstack,
)
from minillm_jax.rollout.compiled import decoding
from minillm_jax.rollout.warp import Warp, best, choose, warped
from minillm_jax.types import Array, Params


@flax.struct.dataclass
class Response:
    """Generated ids [B, N], right-padded, and their mask up to the first end of sequence.

    With `with_states` the states [B, N, E] that predicted them, too: `hidden_states` of prompt and
    response, but for rounding, and 0 where nothing was written.
    """

    tokens: Array
    mask: Array
    hidden: Array | None = None


@flax.struct.dataclass
class Writing:
    """Rows on their way: what a decoding step reads and writes, [B, ...] but for `t`."""

    t: jax.Array  # int32 scalar, tokens written
    done: jax.Array  # [B] bool
    hidden: jax.Array  # [B, E], the state that predicts token t
    cache: Cache
    history: jax.Array  # [B, P + N] ids of prompt and response
    mask: jax.Array  # [B, N]
    uniforms: jax.Array  # [B, N] in [0, 1), those of the draws
    limits: jax.Array  # [B] int32, tokens after which a row ends at the latest
    greedy: jax.Array | None  # [B] bool, rows that take the best token
    states: jax.Array | None  # [B, N, E], those that predicted the tokens written


@decoding(
    static_argnames=(
        "config", "slots", "warp", "eos_id", "pad_id", "vocab", "dtype", "with_greedy", "most",
        "with_states",
    ),
)  # fmt: skip
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
    with_states: bool = False,
    dtype: str | None = None,
    most: int | None = None,
) -> Response:
    """Answers of up to `slots` tokens, one loop on the device that ends when every row has ended.

    The same key gives the same tokens whatever the batch is padded to; `vocab` is the number of
    true ids, those beyond it are never drawn. The n-gram ban looks at prompt and response, as the
    paper's evaluation does, but not at padding. `with_greedy` gives 2 B rows, those B and then the
    greedy answers to the same prompts, which are read once: one program, and a decoding step reads
    its weights once for both. `dtype` is that of arithmetic and cache, by default the parameters'.
    With `most`, at least the tokens of the prompts that `ragged.distinct` counts, no other is read.
    With `with_states` the response has the hidden states that predicted its tokens.
    """
    weights = unstack(config, params, dtype or params["embed"]["tokens"].dtype)
    start = begin(
        config, weights, prompt, prompt_mask, key,
        slots=slots, dtype=dtype, with_greedy=with_greedy, with_states=with_states, most=most,
        stacked=None if most is None else params["layers"],
    )  # fmt: skip
    end = go_on(
        config, weights, start, warp=warp, eos_id=eos_id, pad_id=pad_id, vocab=vocab, dtype=dtype
    )
    return answers_of(end, pad_id)


def begin(
    config: DecoderConfig,
    weights: DecodeParams,
    prompt: jax.Array,  # [B, P]
    prompt_mask: jax.Array,  # [B, P]
    key: jax.Array,
    limits: jax.Array | None = None,  # [B]
    *,
    slots: int,
    dtype: str | None,
    with_greedy: bool,
    with_states: bool = False,
    most: int | None = None,
    stacked: Params | None = None,
) -> Writing:
    """Read the prompts; the greedy rows, if any, are the second half.

    `most` and `stacked` are those of `extend`.
    """
    rows, width = prompt.shape
    kind: Any = dtype or weights.outer["embed"]["tokens"].dtype
    uniforms = jax.random.uniform(key, (rows, slots))  # whatever rows fill the batch
    limits = jnp.full((rows,), slots, jnp.int32) if limits is None else limits
    cache = init_cache(config, rows, width + slots, kind)
    read = {"most": most, "stacked": stacked, "dtype": kind}
    hidden, cache = extend(config, weights, prompt, prompt_mask, cache, first=True, **read)
    # Left padding is given ids of its own, so that it never completes an n-gram.
    history = jnp.where(prompt_mask, prompt, -1 - jnp.arange(width)[None])
    writing = Writing(
        t=jnp.int32(0),
        done=~prompt_mask.any(axis=1),  # rows that only fill the batch
        hidden=hidden[:, -1],
        cache=cache,
        history=jnp.pad(history, ((0, 0), (0, slots))),
        mask=jnp.zeros((rows, slots), bool),
        uniforms=uniforms,
        limits=limits,
        greedy=None,
        states=jnp.zeros((rows, slots, hidden.shape[-1]), hidden.dtype) if with_states else None,
    )
    if with_greedy:
        # Every leaf has the rows on axis 0, but for the index and `t` that they share.
        writing = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, writing)
        writing = dataclasses.replace(writing, greedy=jnp.arange(2 * rows) >= rows)
    return writing


def go_on(
    config: DecoderConfig,
    weights: DecodeParams,
    writing: Writing,
    *,
    warp: Warp,
    eos_id: int,
    pad_id: int,
    vocab: int,
    dtype: str | None,
    apart: bool = True,
    leave_at: int = 0,
    until: int = 0,
) -> Writing:
    """Write until every row has ended, or before token `until` once `leave_at` rows are left.

    With `apart` the greedy rows, if any, are the second half, as `begin` has them.
    """
    rows, slots = writing.mask.shape
    width = writing.history.shape[1] - slots
    kind: Any = dtype or weights.outer["embed"]["tokens"].dtype
    top = head(config, weights.outer)

    def unfinished(now: Writing):
        left = jnp.sum(~now.done)
        return (now.t < slots) & (left > jnp.where(now.t < until, leave_at, 0))

    def chosen(scores, uniform):
        if writing.greedy is None:
            return choose(warp, scores, uniform)
        if not apart:
            return jnp.where(writing.greedy, best(scores), choose(warp, scores, uniform))
        half = rows // 2
        drawn = choose(warp, scores[:half], uniform[:half])
        return jnp.concatenate([drawn, best(scores[half:])])

    def step(now: Writing):
        scores = logits(top, now.hidden)[:, :vocab]
        scores = warped(warp, scores, now.history, width + now.t)
        uniform = jax.lax.dynamic_index_in_dim(now.uniforms, now.t, axis=1, keepdims=False)
        token = jnp.where(now.done, pad_id, chosen(scores, uniform))
        states = now.states
        if states is not None:
            state = jnp.where(now.done[:, None], 0, now.hidden)[:, None]
            states = jax.lax.dynamic_update_slice(states, state, (0, now.t, 0))
        done = now.done | (token == eos_id) | (now.t + 1 >= now.limits)
        here = ~done[:, None]
        hidden, cache = extend(config, weights, token[:, None], here, now.cache, dtype=kind)
        return dataclasses.replace(
            now,
            t=now.t + 1,
            done=done,
            hidden=hidden[:, 0],
            cache=cache,
            history=jax.lax.dynamic_update_slice(now.history, token[:, None], (0, width + now.t)),
            mask=jax.lax.dynamic_update_slice(now.mask, ~now.done[:, None], (0, now.t)),
            states=states,
        )

    return jax.lax.while_loop(unfinished, step, writing)


@partial(jax.jit, static_argnames="pad_id")
def answers_of(writing: Writing, pad_id: int) -> Response:
    """What is written."""
    tokens = writing.history[:, -writing.mask.shape[1] :]
    return Response(jnp.where(writing.mask, tokens, pad_id), writing.mask, writing.states)
