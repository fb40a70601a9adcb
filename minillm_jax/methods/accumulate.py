"""Gradients of a global batch, micro-batch by micro-batch, exactly as if it were one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.objectives.reduce import Pair, add, mean
from minillm_jax.types import Array, Params, Sequences

# (params, micro-batch, window) -> the summed loss whose gradient is wanted, and pairs (sum, count)
# to log; the pair named "loss" holds that sum with its count. No row has more than `window` tokens.
LossSums = Callable[[Params, Any, int | None], dict[str, Pair]]


def lengths(rows: Sequences) -> Array:
    """Tokens of each prompt and its response together [B]."""
    return rows.prompt_mask.sum(axis=1) + rows.response_mask.sum(axis=1)


def spread(tokens: np.ndarray, micro_batches: int) -> np.ndarray:
    """An order of rows with so many tokens [B] in which each micro-batch has rows of like length.

    Micro-batch i is the rows i, i + n, i + 2n, ... of n micro-batches; the shortest are in the
    first one.
    """
    return np.argsort(tokens, kind="stable").reshape(micro_batches, -1).T.reshape(-1)


def gradients(
    loss_sums: LossSums,
    params: Params,
    batch: Any,
    micro_batches: int,
    *,
    windows: Sequence[int] = (),
    tokens: Array | None = None,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of sum(loss) / sum(count) over the whole batch, and the means of all pairs.

    The count depends on masks alone, so gradients of the sums are added over the micro-batches and
    divided once: the result does not depend on how the batch is cut, nor on the windows.

    Args:
        batch: a pytree whose leaves have the batch on axis 0; `micro_batches` must divide it.
        windows: rising; a micro-batch is read in the first that holds its longest row, or in the
            last. Empty: in all slots.
        tokens: of the rows [B]; without them it is the last window.
    """

    def at(window: int | None) -> Callable:
        def total(params, micro):
            pairs = loss_sums(params, micro, window)
            return pairs["loss"].sum, pairs

        return jax.grad(total, has_aux=True)

    grads_at = [at(window) for window in windows or (None,)]

    def grad(params, micro):
        one, tokens = micro
        if tokens is None or len(grads_at) == 1:
            return grads_at[-1](params, one)
        which = sum((jnp.max(tokens) > window).astype(jnp.int32) for window in windows[:-1])
        return jax.lax.switch(which, grads_at, params, one)

    if micro_batches == 1:
        grads, pairs = grad(params, (batch, tokens))
    else:
        micro = jax.tree.map(
            # Every micro-batch takes rows of every device, which hold consecutive ones.
            lambda x: jnp.swapaxes(
                x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1
            ),
            (batch, tokens),
        )

        def step(carry, one):
            grads, pairs = grad(params, one)
            return (jax.tree.map(jnp.add, carry[0], grads), add(carry[1], pairs)), None

        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, pairs), _ = jax.lax.scan(step, zeros, micro)
    count = jnp.maximum(pairs["loss"].count, 1)
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), mean(pairs)


def dropout_keys(seed: int | None, step: jax.Array, micro_batches: int) -> jax.Array | None:
    """One key per micro-batch [micro_batches]: fold_in(fold_in(key(seed), step), i); None if off.

    They go into the batch of `gradients`, which hands each micro-batch its own. The keys follow
    from the number of the update, so a run that starts again has the same dropout.
    """
    if seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(micro_batches))
