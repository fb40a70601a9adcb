"""Attention in plain array operations: rotary angles, who sees whom, and the softmax.

No parameters are here, and no cache: `decoder.py` projects, `cache.py` stores, and says which heads
lie side by side.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.axes import platform
from minillm_jax.models import native
from minillm_jax.models.config import DecoderConfig

# Finite, so that a row that may see no key gives a plain mean and not NaN, in its gradient too.
_MASKED = -1e30

# A cache of as many slots or more is read no further than a quarter, half, ... of it that is filled
# (benchmarks/README.md, "Scaling"); of fewer, reading all costs less than compiling four of each.
LONG = 512
_QUARTERS = 4


def attend(
    q: jax.Array,  # [B, K, G, T, h], query head k * G + g reads key-value head k
    k: jax.Array,  # [B, K, S, h]
    v: jax.Array,  # [B, K, S, h]
    mask: jax.Array,  # [B, T, S] bool, True where the query may see the key
    scale: float,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    filled: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale q k^T) v over the keys that `mask` allows, [B, K, G, T, h] like `q`.

    `drop` is the dropout of the weights. `filled` is a number of slots, beyond which `mask` allows
    none: on a CPU those are not read, or not all of them.

    Heads lead time on both sides, so that each (batch, kv head) is one matrix product and grouped
    heads share their keys without a copy. The softmax is in float32 whatever the inputs are.
    """
    slots = k.shape[2]
    if filled is not None and q.shape[3] <= native.FEW and native.usable(q, k, v):
        return native.attend(q, k, v, mask, scale, filled)
    if filled is not None and slots >= LONG and platform() == "cpu":
        sizes = [-(-slots * n // _QUARTERS) for n in range(1, _QUARTERS + 1)]
        reads = [functools.partial(_attend_to, size, scale) for size in sizes]
        return jax.lax.switch(jnp.sum(filled > jnp.array(sizes[:-1])), reads, q, k, v, mask)
    if q.shape[3] == 1 and platform() == "cpu":
        return _attend_by_sums(q, k, v, mask, scale, drop)
    groups, steps = q.shape[2:4]
    folded = q.reshape(*q.shape[:2], groups * steps, q.shape[-1])
    scores = jnp.einsum("bkth,bksh->bkts", folded, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*q.shape[:4], k.shape[2]) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1)
    weights = weights if drop is None else drop(weights)
    weights = weights.reshape(scores.shape[0], scores.shape[1], groups * steps, -1)
    return jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v).reshape(q.shape)


def side_by_side(k: jax.Array, together: int) -> jax.Array:
    """Return keys or values [B, K, C, h] with `together` heads, g, in one: [B, K / g, C, g h]."""
    batch, heads, chunk, width = k.shape
    apart = k.reshape(batch, heads // together, together, chunk, width)
    return apart.swapaxes(2, 3).reshape(batch, heads // together, chunk, together * width)


def attend_side_by_side(
    q: jax.Array,  # [B, K, G, T, h]
    k: jax.Array,  # [B, K / g, S, g h]
    v: jax.Array,  # [B, K / g, S, g h]
    mask: jax.Array,  # [B, T, S]
    scale: float,
    filled: jax.Array,
) -> jax.Array:
    """`attend` to heads that lie `side_by_side`, [B, K, G, T, h] like `q`.

    A query is as wide as they are, with zeros where the other heads' numbers lie; of what it
    gathers its own head's part is kept. Products are g times as many, and those of a g-th of the
    number of heads.
    """
    together = q.shape[1] // k.shape[1]
    if together == 1:
        return attend(q, k, v, mask, scale, filled=filled)
    batch, heads, groups, steps, width = q.shape
    shape = batch, heads // together, together, groups, steps, together, width
    own = jnp.eye(together, dtype=q.dtype)[None, None, :, None, None, :, None]
    wide = (q.reshape(*shape[:5], 1, width) * own).reshape(
        batch, heads // together, together * groups, steps, together * width
    )
    found = attend(wide, k, v, mask, scale, filled=filled).reshape(shape)
    return jnp.sum(found * own, axis=-2).reshape(q.shape)


def _attend_to(size, scale, q, k, v, mask) -> jax.Array:
    """`attend` to the first `size` slots."""
    return attend(q, k[:, :, :size], v[:, :, :size], mask[:, :, :size], scale)


def _attend_by_sums(q, k, v, mask, scale, drop) -> jax.Array:
    """`attend` of one query: products with G rows each are slower on a CPU than fused sums."""
    one = q.astype(jnp.float32)  # [B, K, G, 1, h]
    scores = jnp.sum(one * k[:, :, None].astype(jnp.float32), axis=-1) * scale  # [B, K, G, S]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
    weights = weights if drop is None else drop(weights)
    summed = jnp.sum(weights[..., None] * v[:, :, None].astype(jnp.float32), axis=3, keepdims=True)
    return summed.astype(v.dtype)


def causal_mask(mask: jax.Array) -> jax.Array:
    """Return [B, T, T], true where a query sees a key: the real slots of `mask` up to its own."""
    slots = jnp.arange(mask.shape[1])
    return mask[:, None, :] & (slots[None, None, :] <= slots[None, :, None])


def positions_of(mask: jax.Array) -> jax.Array:
    """Return the real tokens before each slot of `mask` [..., T], int32, wherever the padding is.

    A padded slot takes the position of its left neighbour, or 0.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def rotary_frequencies(config: DecoderConfig) -> np.ndarray:
    """Return theta^(-2i / rope_dim), rescaled, float32 [rope_dim / 2] (RoFormer, section 3.2.2)."""
    frequencies = config.rope_theta ** -(np.arange(0, config.rope_dim, 2) / config.rope_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary_angles(
    config: DecoderConfig, positions: jax.Array, below: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of every angle at `positions` [B, T], float32 [B, T, rope_dim / 2].

    With `below`, a bound of the positions, a CPU looks them up: in layers that are not scanned XLA
    would compute both again for every head of every layer, a tenth of a decoding step of 32 rows.
    """
    frequencies = rotary_frequencies(config)
    if below is not None and platform() == "cpu":
        table = np.arange(below, dtype=np.float32)[:, None] * frequencies
        cos, sin = (jnp.asarray(f(table.astype(np.float64)), jnp.float32) for f in (np.cos, np.sin))
        return cos[positions], sin[positions]
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: jax.Array,  # [B, T, heads, h]
    angles: tuple[jax.Array, jax.Array],  # cosine and sine [B, T, rope_dim / 2]
    interleaved: bool,
) -> jax.Array:
    """Turn the feature pairs of `x` by their angles in float32; features past rope_dim stay."""
    cos, sin = (part[:, :, None] for part in angles)
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)
