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
            lambda x: x.reshape(micro_batches, x.shape[0] // micro_batches, *x.shape[1:]), batch
        )

        def step(carry, one):
            grads, pairs = grad(params, one)
            return (jax.tree.map(jnp.add, carry[0], grads), add(carry[1], pairs)), None

        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, pairs), _ = jax.lax.scan(step, zeros, micro)
    count = jnp.maximum(pairs["loss"].count, 1)
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), mean(pairs)
