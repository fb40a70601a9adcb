"""Each distinct token read once, outside attention: no padding, and a common beginning one time.

```
slot      0 1 2 3 4 5            real  0 1 2 3 4 5
row 0     . . a b x .    gather        a b x y z .        [1, R, D], R at least the distinct ones
row 1     . a b y z .    <=>           embedding, norms, projections, MLP
                         spread        attention: [B, T, D] again
```
What is no attention takes each slot alone, and the state of a slot follows from the tokens up to
it. So slots of padding are not needed, and where a row begins as the first one does (`a b`, the
words of a template), its states are the first one's: nothing is lost but time. It is for rows that
are on one device: over several, each would have its own number of tokens.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from minillm_jax.models.attention import positions_of

# Shares of the slots in which what is read is counted. Each is a program of its own: of scoring it
# takes a second to compile, of an update and of generation from five to twenty.
SCORING = tuple(n / 16 for n in range(1, 16))
PROMPTS = 1 / 4, 1 / 2, 3 / 4
UPDATES = 3 / 8, 5 / 8, 3 / 4


@flax.struct.dataclass
class Real:
    """Where the tokens that are read stand in [B, T], and where each slot has its state from."""

    slots: jax.Array  # [R] int32 in B * T, rising; B * T behind the last one
    place: jax.Array  # [B * T] int32 in R; R for padding
    own: jax.Array  # [B * T] int32 in R of the slots that are read, R for all others
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)  # B, T


def distinct(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return which slots of `tokens` [B, T] are read, and which slot of B * T stands for each.

    A row shares what it begins with in common with the first row that has a token.
    """
    slots = mask.shape[1]
    positions = positions_of(mask)
    first = jnp.argmax(mask.any(axis=1))
    # Where the first row has its token of each position, T behind its last one.
    at = jnp.nonzero(mask[first], size=slots, fill_value=slots)[0]
    lead = at[positions]  # [B, T]
    same = mask & (lead < slots) & (tokens == tokens[first][jnp.minimum(lead, slots - 1)])
    shared = same & (jnp.cumsum(mask & ~same, axis=1) == 0)
    here = jnp.arange(mask.size).reshape(mask.shape)
    source = jnp.where(shared, first * slots + lead, here)
    return mask & (source == here), source


def room(tokens: Any, mask: Any, shares: Sequence[float], micro_batches: int = 1) -> int | None:
    """Return `most` for `find` on the host: what is read of `tokens` [B, T] or of a micro-batch.

    A micro-batch is the rows i, i + n, ... of n. It is the first of `shares`, which rise, of the
    slots that is enough; None if that takes all, or while a program is traced.
    """
    if isinstance(mask, Tracer):
        return None
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    slots = mask.size // micro_batches
    parts = (slice(first, None, micro_batches) for first in range(micro_batches))
    read = max(int(_count(tokens[rows], mask[rows])) for rows in parts)
    return next((most for share in shares if read <= (most := int(share * slots))), None)


@jax.jit
def _count(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return distinct(tokens, mask)[0].sum()


def find(tokens: jax.Array, mask: jax.Array, most: int) -> Real:
    """Return what is read of `tokens` [B, T]: `most` R or fewer slots; any others are lost."""
    read, source = (x.reshape(-1) for x in distinct(tokens, mask))
    slots = jnp.nonzero(read, size=most, fill_value=read.size)[0].astype(jnp.int32)
    own = jnp.where(read, jnp.cumsum(read, dtype=jnp.int32) - 1, most)
    place = jnp.where(mask.reshape(-1), own[source], most)
    return Real(slots, place, own, (mask.shape[0], mask.shape[1]))


def gather(x: jax.Array, real: Real) -> jax.Array:
    """Return what is read of `x` [B, T, ...] as [1, R, ...], zeros behind the last one."""
    return _gathered(x.reshape(-1, *x.shape[2:]), real.slots, real.own)[None]


def spread(x: jax.Array, real: Real) -> jax.Array:
    """Return `x` [1, R, ...] at all slots, [B, T, ...], zeros in padding."""
    return _at(x[0], real.place).reshape(*real.shape, *x.shape[2:])


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x` [n, ...] at `index` [m], zeros where that is n."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _gathered(x: jax.Array, slots: jax.Array, own: jax.Array) -> jax.Array:
    """`_at(x, slots)`, whose gradient is gathered, too: no slot is in `slots` twice."""
    return _at(x, slots)


_gathered.defvjp(
    lambda x, slots, own: (_at(x, slots), own), lambda own, dy: (_at(dy, own), None, None)
)
