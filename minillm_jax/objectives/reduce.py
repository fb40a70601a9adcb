"""Sums over tokens as (sum, count) pairs: they add up exactly over micro-batches and hosts.

Everything else in `objectives` returns one value per token; this is the only place that sums them.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from minillm_jax.types import Array


class Pair(NamedTuple):
    """A sum and what it is to be divided by; a pytree, so `jax.lax.psum` and `add` apply."""

    sum: jax.Array
    count: jax.Array


def keep(values: Array, mask: Array) -> jax.Array:
    """`values` where the mask is set, else 0; a mask [B, N] also blanks [B, N, ...].

    Selecting before the arithmetic (not multiplying after it) is what keeps NaN in padding out of
    the gradient, where 0 * NaN would be NaN.
    """
    mask = mask.astype(bool).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def total(
    values: Array,  # [B, N]
    mask: Array,  # [B, N]
    per: Literal["token", "sequence"] = "token",
) -> Pair:
    """Sum of the real tokens, and how many tokens (or sequences that have a token) there are."""
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([values, mask])
    mask = mask.astype(bool)
    counted = mask if per == "token" else mask.any(-1)
    return Pair(jnp.sum(keep(values, mask)), jnp.sum(counted, dtype=values.dtype))


def row_sums(values: Array, mask: Array) -> jax.Array:
    """Sum of the real tokens of each row of [B, N]: [B]."""
    chex.assert_equal_shape([values, mask])
    return jnp.sum(keep(values, mask), axis=1)


def add(first: Any, second: Any) -> Any:
    """The pairs of two parts of a batch as the pairs of their union; any pytree of pairs."""
    return jax.tree.map(jnp.add, first, second)


def mean(pairs: Any) -> Any:
    """sum / count of every pair in a pytree, 0 where nothing was counted."""
    return jax.tree.map(
        lambda pair: pair.sum / jnp.maximum(pair.count, 1),
        pairs,
        is_leaf=lambda node: isinstance(node, Pair),
    )


def effective_sample_size(weight: Array, mask: Array) -> jax.Array:
    """Kish's (sum w)^2 / (n sum w^2) of importance weights [B, N]: in (0, 1], 1 if all equal."""
    first, n = total(weight, mask)
    second = total(jnp.square(weight), mask).sum
    return jnp.where(second > 0, jnp.square(first) / jnp.where(second > 0, n * second, 1), 0)
