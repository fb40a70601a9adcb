"""Gradients of a global batch, micro-batch by micro-batch, exactly as if it were one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from minillm_jax.axes import largest
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
    divided once: the result does not depend on how the batch is cut, nor on the windows. Devices
    along `data` hold the same parameters: each adds up those of its own rows, and their sum is
    taken once, after the last micro-batch, where the compiler would send each kernel's share in
    every pass. (Not where the rows do not divide so: `_apart`.)

    Args:
        batch: a pytree whose leaves have the batch on axis 0; `micro_batches` must divide it.
        windows: rising; a micro-batch is read in the first that holds its longest row, or in the
            last. Empty: in all slots.
        tokens: of the rows [B]; without them it is the last window.
    """

    sums = partial(_sums, loss_sums, micro_batches, windows)
    if _apart(batch, micro_batches):
        sums = _over_data(sums)
    grads, pairs = sums(params, batch, tokens)
    count = jnp.maximum(pairs["loss"].count, 1)
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), mean(pairs)


def _apart(batch: Any, micro_batches: int) -> bool:
    """Whether devices along `data` each sum their own rows, which have to divide.

    Not where both other axes have several devices, too: XLA's partitioner (that of jax 0.10.2)
    then ends the process over a lookup in a table that is split along `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1 or min(mesh.shape["fsdp"], mesh.shape["tensor"]) > 1:
        return False
    rows = mesh.shape["data"] * micro_batches
    return all(x.shape[0] % rows == 0 for x in jax.tree.leaves(batch) if not _is_key(x))


def _over_data(sums: Callable) -> Callable:
    """`sums` of the rows of each device along `data`, added up; their keys differ."""

    def own(params: Params, batch: Any, tokens: Array | None) -> Any:
        place = jax.lax.axis_index("data")
        fold = jax.vmap(jax.random.fold_in, (0, None))
        batch = jax.tree.map(lambda x: fold(x, place) if _is_key(x) else x, batch)
        return jax.lax.psum(sums(params, batch, tokens), "data")

    def added(params: Params, batch: Any, tokens: Array | None) -> Any:
        whole, rows = PartitionSpec(), PartitionSpec("data")
        specs = jax.tree.map(lambda x: whole if _is_key(x) else rows, batch)
        return jax.shard_map(
            own, in_specs=(whole, specs, rows), out_specs=whole, axis_names={"data"},
            check_vma=False,
        )(params, batch, tokens)  # fmt: skip

    return added


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _sums(
    loss_sums: LossSums,
    micro_batches: int,
    windows: Sequence[int],
    params: Params,
    batch: Any,
    tokens: Array | None,
) -> tuple[Params, dict[str, Pair]]:
    """Gradient of the summed loss, and all pairs, over the micro-batches."""

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
        which = sum((largest(tokens) > window).astype(jnp.int32) for window in windows[:-1])
        return jax.lax.switch(which, grads_at, params, one)

    if micro_batches == 1:
        return grad(params, (batch, tokens))
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
    return jax.lax.scan(step, zeros, micro)[0]


def dropout_keys(seed: int | None, step: jax.Array, micro_batches: int) -> jax.Array | None:
    """One key per micro-batch [micro_batches]: fold_in(fold_in(key(seed), step), i); None if off.

    They go into the batch of `gradients`, which hands each micro-batch its own, and makes others of
    them for the devices along `data`. The keys follow from the number of the update, so a run that
    starts again has the same dropout.
    """
    if seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(micro_batches))
