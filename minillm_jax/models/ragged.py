"""Padding left out of everything but attention.

```
slot      0 1 2 3 4 5            real  0 1 2 3 4 5 6
row 0     . . a b x .    gather        a b x c y z .      [1, R, D], R at least the real slots
row 1     . c y z . .    <=>           embedding, norms, projections, MLP
                         spread        attention: [B, T, D] again
```
A projection takes each token alone, so nothing is lost but the time of the padding. It is for rows
that are on one device: over several, each would have its own number of real slots.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Real:
    """Which slots of [B, T] are real, both ways."""

    slots: jax.Array  # [R] int32 in B * T, rising; B * T behind the last one
    place: jax.Array  # [B * T] int32 in R; R for padding
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)  # B, T


def find(mask: jax.Array, most: int) -> Real:
    """Return the real slots of `mask` [B, T], `most` R or fewer of them; any others are lost."""
    flat = mask.reshape(-1)
    slots = jnp.nonzero(flat, size=most, fill_value=flat.size)[0].astype(jnp.int32)
    place = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, most)
    return Real(slots, place, (mask.shape[0], mask.shape[1]))


def gather(x: jax.Array, real: Real) -> jax.Array:
    """Return the real slots of `x` [B, T, ...] as [1, R, ...], zeros behind the last one."""
    flat = x.reshape(-1, *x.shape[2:])
    return _moved(flat, real.slots, real.place)[None]


def spread(x: jax.Array, real: Real) -> jax.Array:
    """Return `x` [1, R, ...] at its slots, [B, T, ...], zeros in padding."""
    flat = _moved(x[0], real.place, real.slots)
    return flat.reshape(*real.shape, *x.shape[2:])


@jax.custom_vjp
def _moved(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """`x` [n, ...] at `index` [m], zeros where it is n; its gradient is the same by `back` [n]."""
    return x.at[index].get(mode="fill", fill_value=0)


def _forward(x, index, back):
    return _moved(x, index, back), (index, back)


def _backward(kept, dy):
    index, back = kept
    return _moved(dy, back, index), None, None


_moved.defvjp(_forward, _backward)
