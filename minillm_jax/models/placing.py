"""Where the parameters of a checkpoint go: arrays of the host, or sharded ones of the devices.

A stacked array [L, ...] is filled one layer at a time. On devices the layer alone is handed over,
each device getting its own part of it, and written in place into the sharded array; so the host
holds one tensor of one layer, on every backend and mesh. This file knows shardings, but no mesh.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from numpy.typing import DTypeLike

from minillm_jax.types import Array, Params


def allocate(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None) -> Array:
    """Return a new array for `write`, on the host without a sharding, else on devices."""
    if sharding is None:
        return np.empty(shape, dtype)
    return _zeros(shape, np.dtype(dtype), sharding)


def write(whole: Array, layer: int, part: np.ndarray) -> Array:
    """Return `whole` [L, ...] with `part` [...] as its layer; the memory of `whole` is reused."""
    if isinstance(whole, np.ndarray):
        whole[layer] = part
        return whole
    sharding = whole.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if part.dtype.itemsize > whole.dtype.itemsize:
        part = part.astype(whole.dtype)  # the smaller of both travels
    whole = _writer(whole.sharding)(whole, _put(part, sharding), layer)
    # Else the layers of the whole model would queue up on the host.
    return jax.block_until_ready(whole)


def put(array: np.ndarray, dtype: DTypeLike, sharding: Sharding | None) -> Array:
    """Return the whole `array` in `dtype`, on the host without a sharding, else on devices."""
    array = array.astype(dtype, copy=False)
    return array if sharding is None else _put(array, sharding)


def take_layers(params: Params, kept: Sequence[int], shardings: Params) -> Params:
    """Return a copy of device arrays with only the layers `kept`, or all where that is empty.

    Nothing is shared with `params`, so that either can be donated.
    """
    return _taker(tuple(kept), tuple(jax.tree.leaves(shardings)), jax.tree.structure(shardings))(
        params
    )


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _writer(sharding: Sharding) -> Any:
    def update(whole, part, layer):
        return jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), layer, 0)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _taker(kept: tuple[int, ...], shardings: tuple[Sharding, ...], tree: Any) -> Any:
    def take(params):
        copy = jax.tree.map(jnp.copy, params)  # an argument that is returned may be the same memory
        if kept:
            rows = np.array(kept)
            copy["layers"] = jax.tree.map(lambda leaf: leaf[rows], params["layers"])
        return copy

    return jax.jit(take, out_shardings=jax.tree.unflatten(tree, shardings))
