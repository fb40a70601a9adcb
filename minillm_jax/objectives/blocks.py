"""A batch [B, N] in blocks of a few positions of all rows, and the head's gradient over them.

On a mesh the rows of a block stay on their devices. What is summed over tokens is summed on each
device first, in a leading dimension of so many parts, and over the devices once, after the last
block: a sum over all rows within the loop would send the head's gradient in every block.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from minillm_jax.axes import constrain, largest, parts, platform
from minillm_jax.types import Array

# Tokens of a block where none are asked for. The head's gradient, [V, D] in float32, is read and
# written in every block: on an H200 256 took 1.6 to 1.9 times as long as 1,024, which still are a
# sixth of the memory of whole logits, and on TPUs, by their compiler, 1.4 to 2.2 times
# (benchmarks/README.md). On a CPU more tokens gain nothing.
_BLOCK_ON = {"gpu": 1024, "tpu": 1024}
_BLOCK = 256

HeadGrad = tuple[jax.Array, jax.Array | None]  # d weight^T [W, D, V], d bias [W, V]


class Blocks:
    """[B, N, ...] cut along N into [n, R, ...] with R tokens of all rows, and back.

    `ways` W is into how many parts the mesh in use splits the rows; `block` counts the tokens of
    one of them, None for what is best on these devices.
    """

    def __init__(self, labels: Array, block: int | None = None):
        chex.assert_rank(labels, 2)
        block = block or _BLOCK_ON.get(platform(), _BLOCK)
        self.rows, self.positions = labels.shape
        self.ways = parts("batch", self.rows)
        own = self.rows // self.ways
        self.blocks = max(1, -(-own * self.positions // max(block, own)))
        self.width = -(-self.positions // self.blocks)

    def split(self, x: Array) -> jax.Array:
        """[B, N, ...] -> [n, R, ...], zeros behind the last position."""
        spare = self.blocks * self.width - self.positions
        x = jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(self.rows, self.blocks, self.width, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(self.blocks, self.rows * self.width, *x.shape[3:])

    def join(self, x: jax.Array) -> jax.Array:
        """[n, R] -> [B, N]."""
        x = jnp.moveaxis(x.reshape(self.blocks, self.rows, self.width), 0, 1)
        return x.reshape(self.rows, -1)[:, : self.positions]

    def filled(self, mask: Array) -> jax.Array:
        """How many blocks it takes to reach the last token of the longest row of a mask [B, N]."""
        reach = largest(jnp.where(mask, jnp.arange(1, self.positions + 1), 0))
        return (reach + self.width - 1) // self.width


def over(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, blocks: Any, filled: jax.Array | None
) -> tuple[Any, Any]:
    """`lax.scan` over the first `filled` blocks, all if None; the others give zeros."""
    if filled is None:
        return lax.scan(step, carry, blocks)

    def at(i: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, rows = carried
        block = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)
        carry, row = step(carry, block)
        return carry, jax.tree.map(
            lambda whole, one: lax.dynamic_update_index_in_dim(whole, one, i, 0), rows, row
        )

    count = len(jax.tree.leaves(blocks)[0])
    _, row = jax.eval_shape(step, carry, jax.tree.map(lambda x: x[0], blocks))
    empty = jax.tree.map(lambda one: jnp.zeros((count, *one.shape), one.dtype), row)
    return lax.fori_loop(0, filled, at, (carry, empty))


def apart(x: Array, ways: int) -> jax.Array:
    """[R, ...] -> [W, R / W, ...], a part for the rows of each device."""
    return jnp.reshape(x, (ways, -1, *x.shape[1:]))


def no_grad(weight: Array, bias: Array | None, ways: int) -> HeadGrad:
    """Zeros to begin with, in float32 (float64 for such a weight), of a head [V, D]."""
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    size, width = weight.shape
    empty = None
    if bias is not None:
        empty = constrain(jnp.zeros((ways, size), dtype), "batch", "vocab")
    return constrain(jnp.zeros((ways, width, size), dtype), "batch", None, "vocab"), empty


def add_grad(
    carry: HeadGrad,
    grad: Array,  # of the logits, [R, V]
    hidden: Array,  # [R, D]
    ways: int,
) -> HeadGrad:
    """`carry` with a block's share."""
    weight, bias = carry
    low, dtype = grad.astype(hidden.dtype), grad.dtype
    if ways == 1:
        # The barrier keeps XLA from folding the transpose into a product that contracts the first
        # dimension of both operands, which some of its CPU versions run several times slower.
        across = lax.optimization_barrier(hidden.T)
        weight += jnp.matmul(across, low, preferred_element_type=dtype)[None]
    else:
        own = "wrd,wrv->wdv", apart(hidden, ways), apart(low, ways)
        share = jnp.einsum(*own, preferred_element_type=dtype)
        weight += constrain(share, "batch", None, "vocab")
    if bias is not None:
        bias += constrain(apart(grad, ways).sum(1), "batch", "vocab")
    return weight, bias


def whole_grad(carry: HeadGrad) -> tuple[jax.Array, jax.Array | None]:
    """d weight [V, D] and d bias [V] of all rows: the one sum over devices."""
    weight, bias = carry
    return weight.sum(0).T, None if bias is None else bias.sum(0)
