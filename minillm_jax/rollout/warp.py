"""From logits to a token: what reshapes a distribution before a draw, and the draw itself.

Training rollouts draw from the models as they are; the warps serve generation and evaluation.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NEVER = -1e30  # a logit that cannot be drawn, finite so that differences stay finite


@dataclass(frozen=True)
class Warp:
    """How to draw: temperature (0 is greedy), the best `top_k` ids (0: all), the nucleus `top_p`
    (1: all), and a ban on repeating any n-gram of `no_repeat_ngram` ids (0: none)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One id per row, distributed as softmax(logits), by inverting the CDF in two levels.

    Gumbel noise needs a random number per id, which over 49k ids costs as much as several layers
    of a small model; this needs one per row: find the block of ids in which the CDF crosses
    `uniform`, then the id inside that block.

    Args:
        logits: [B, V], any float type; ids at or below `NEVER` cannot come out.
        uniform: [B] in [0, 1).

    Returns:
        [B] int32.
    """
    logits = logits.astype(jnp.float32)
    batch, vocab = logits.shape
    width = max(1, round(vocab**0.5))
    blocks = -(-vocab // width)
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.pad(weight, ((0, 0), (0, blocks * width - vocab)))
    weight = weight.reshape(batch, blocks, width)
    mass = jnp.cumsum(weight.sum(-1), axis=-1)  # [B, blocks]
    target = uniform * mass[:, -1]
    block = jnp.sum(mass <= target[:, None], axis=-1)
    block = jnp.minimum(block, _last_positive(jnp.diff(mass, prepend=0.0, axis=-1)))
    before = jnp.where(block > 0, jnp.take_along_axis(mass, block[:, None] - 1, 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(weight, block[:, None, None], 1)[:, 0]  # [B, width]
    offset = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
    # Rounding may push the target past the last id that has any weight.
    offset = jnp.minimum(offset, _last_positive(inside))
    return (block * width + offset).astype(jnp.int32)


def _last_positive(weight: jax.Array) -> jax.Array:
    """Index of the last positive entry of each row of `weight` [B, n]."""
    return jnp.max(jnp.where(weight > 0, jnp.arange(weight.shape[-1])[None], 0), axis=-1)


def warped(warp: Warp, logits: jax.Array, history: jax.Array, length: jax.Array) -> jax.Array:
    """Logits after the ban, the temperature, top-k and top-p, in that order.

    Args:
        warp: what to do; static.
        logits: [B, V].
        history: [B, M] ids so far, right-aligned entries beyond `length` ignored.
        length: number of valid ids in `history`, a scalar shared by the rows.

    Returns:
        [B, V] float32; excluded ids at `NEVER`.
    """
    logits = logits.astype(jnp.float32)
    if warp.no_repeat_ngram:
        logits = jnp.where(
            _banned(history, length, warp.no_repeat_ngram, logits.shape[-1]), NEVER, logits
        )
    if warp.temperature not in (0.0, 1.0):
        logits = logits / warp.temperature
    if 0 < warp.top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, warp.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, NEVER, logits)
    if warp.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        cumulative = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # The nucleus is the fewest ids whose mass reaches top_p, and those as likely as the last of
        # them: keep an id when the mass before it is still short of top_p, so that the best stays.
        size = jnp.sum(
            jnp.pad(cumulative, ((0, 0), (1, 0)))[:, :-1] < warp.top_p, axis=-1, keepdims=True
        )
        threshold = jnp.take_along_axis(ordered, jnp.maximum(size - 1, 0), axis=-1)
        logits = jnp.where(logits < threshold, NEVER, logits)
    return logits


def best(logits: jax.Array) -> jax.Array:
    """The first id with the highest of `logits` [B, V], [B] int32."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def choose(warp: Warp, logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """An id for each row of `logits` [B, V], which are warped already; returns [B] int32.

    The best one at temperature 0, else a draw.
    """
    return best(logits) if warp.temperature == 0.0 else draw(logits, uniform)


def _banned(history: jax.Array, length: jax.Array, n: int, vocab: int) -> jax.Array:
    """[B, V] ids that would complete an n-gram already in `history` [B, M]."""
    rows, slots = history.shape
    if n == 1:
        starts = jnp.ones((rows, slots), bool)
        last = history
    elif slots < n:
        return jnp.zeros((rows, vocab), bool)
    else:
        recent = jax.lax.dynamic_slice_in_dim(history, length - (n - 1), n - 1, axis=1)
        starts = jnp.ones((rows, slots - n + 1), bool)
        for k in range(n - 1):
            starts &= history[:, k : slots - n + 1 + k] == recent[:, k : k + 1]
        last = history[:, n - 1 :]
    end = jnp.arange(slots - n + 1)[None] + n  # the n-gram that starts at j ends before j + n
    hit = starts & (end <= length) & (length >= n) & (last >= 0)  # below 0 is padding
    banned = jnp.zeros((rows, vocab), bool)
    return banned.at[jnp.arange(rows)[:, None], last].max(hit)
