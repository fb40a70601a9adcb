"""Gradients of a global batch, micro-batch by micro-batch, exactly as if it were one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.objectives.reduce import Pair, add, mean
from minillm_jax.types import Params

# (params, micro-batch) -> the summed loss whose gradient is wanted, and pairs (sum, count) to log;
# the pair named "loss" holds that sum with its count.
LossSums = Callable[[Params, Any], dict[str, Pair]]


def gradients(
    loss_sums: LossSums, params: Params, batch: Any, micro_batches: int
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of sum(loss) / sum(count) over the whole batch, and the means of all pairs.

    The count depends on masks alone, so gradients of the sums are added over the micro-batches and
    divided once: the result does not depend on how the batch is cut.

    Args:
        batch: a pytree whose leaves have the batch on axis 0; `micro_batches` must divide it.
    """

    def total(params, micro):
        pairs = loss_sums(params, micro)
        return pairs["loss"].sum, pairs

    grad = jax.grad(total, has_aux=True)
    if micro_batches == 1:
        grads, pairs = grad(params, batch)
    else:
        micro = jax.tree.map(
            # Every micro-batch takes rows of every device, which hold consecutive ones.
            lambda x: jnp.swapaxes(
                x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 0, 1
            ),
            batch,
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
