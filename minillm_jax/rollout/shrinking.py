"""Generation whose time follows the tokens that are needed: rows that have ended leave the batch.

```
rows 8  ########   until 4 are left; the host gathers these, cache included, and goes on
     4  ....####
     2  ......##   each size is one more program, so a batch is only ever halved
```

Draws belong to rows (`Writing.uniforms`), so the tokens are those of `generate` with the same key.
"""

from typing import Any

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.axes import constrain
from minillm_jax.models import DecoderConfig, unstack
from minillm_jax.rollout.compiled import decoding
from minillm_jax.rollout.generate import Response, Writing, answers_of, begin, generate, go_on
from minillm_jax.types import Array, Params

# Tokens that may still come where a batch is halved. For fewer, compiling a further program takes
# longer than all the steps that it shortens.
WORTH = 64

_STATIC = ("config", "warp", "eos_id", "pad_id", "vocab", "dtype", "leave_at", "until")


def generate_shrinking(
    config: DecoderConfig,
    params: Params,
    prompt: Array,  # [B, P]
    prompt_mask: Array,  # [B, P]
    key: jax.Array,
    *,
    slots: int,
    pad_id: int,
    dtype: str | None = None,
    with_greedy: bool = False,
    with_states: bool = False,
    limits: jax.Array | None = None,  # [B]
    most: int | None = None,
    ways: int = 1,
    **options: Any,
) -> Response:
    """`generate`, called from the host, with the same answers; its arrays are the host's.

    Whenever half of the rows or more have ended and more than `WORTH` tokens may still come, the
    others go on as a batch of half the size, or of a quarter, ...

    Args:
        limits: most tokens of each row, `slots` by default.
        most, with_states: those of `generate`.
        ways: parts into which the rows are split over the devices; a batch stays a multiple of it.
        options: the others of `generate`.
    """
    until = slots - WORTH  # before this token it is worth while
    if until <= 0 and limits is None:
        given = {"pad_id": pad_id, "dtype": dtype, "with_greedy": with_greedy} | options
        given |= {"most": most, "with_states": with_states}
        found = generate(config, params, prompt, prompt_mask, key, slots=slots, **given)
        return jax.tree.map(hosts.fetch, found)
    kind = dtype or str(params["embed"]["tokens"].dtype)
    weights = _unstacked(config, params, kind)
    options |= {"pad_id": pad_id, "dtype": dtype}

    def half(rows: int) -> int:
        return rows // 2 if rows % (2 * ways) == 0 else 0

    rows = len(prompt) * (1 + with_greedy)
    stacked = None if most is None else params["layers"]
    writing = _first(
        config, weights, stacked, prompt, prompt_mask, key, limits,
        slots=slots, with_greedy=with_greedy, leave_at=half(rows), until=until, most=most,
        with_states=with_states, **options,
    )  # fmt: skip
    found = answers_of(writing, pad_id)
    everything = jax.tree.map(lambda part: np.zeros(part.shape, part.dtype), found)
    place = np.arange(rows)  # of the rows of the batch among all
    while True:
        for whole, part in zip(*map(jax.tree.leaves, (everything, found)), strict=True):
            whole[place] = hosts.fetch(part)
        done = hosts.fetch(writing.done)
        if done.all() or int(hosts.fetch(writing.t)) == slots:
            return everything
        size = len(done)
        while half(size) >= np.sum(~done):
            size = half(size)
        # Rows that have ended fill the batch up and stay as they are.
        kept = np.sort(np.argsort(done, kind="stable")[:size])
        place = place[kept]
        writing = _next(
            config, weights, _taken(writing, kept),
            leave_at=half(size), until=until, **options,
        )  # fmt: skip
        found = answers_of(writing, pad_id)


@decoding(static_argnames=("config", "dtype"))
def _unstacked(config: DecoderConfig, params: Params, dtype: str):
    return unstack(config, params, dtype)


@decoding(static_argnames=(*_STATIC, "slots", "with_greedy", "with_states", "most"))
def _first(
    config, weights, stacked, prompt, prompt_mask, key, limits,
    *, slots, with_greedy, with_states, dtype, most, **options,
) -> Writing:  # fmt: skip
    start = begin(
        config, weights, prompt, prompt_mask, key, limits,
        slots=slots, dtype=dtype, with_greedy=with_greedy, with_states=with_states, most=most,
        stacked=stacked,
    )  # fmt: skip
    return go_on(config, weights, start, dtype=dtype, **options)


@decoding(static_argnames=_STATIC, donate_argnames=("writing",))
def _next(config, weights, writing, **options) -> Writing:
    return go_on(config, weights, writing, apart=False, **options)


@jax.jit
def _taken(writing: Writing, rows: jax.Array) -> Writing:
    """The given `rows` of a batch, laid out like it."""

    def take(x):
        if not x.ndim:
            return x
        names = ("batch", "kv_heads", None, None) if x.ndim == 4 else ("batch",)
        return constrain(x[rows], *names, *[None] * (x.ndim - len(names)))

    return jax.tree.map(take, writing)
