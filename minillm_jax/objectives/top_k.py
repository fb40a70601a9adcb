"""A distribution cut to its k likeliest ids and one outcome for all the others, "the rest".

    outcomes    v_1 ... v_k, rest        p(rest) = 1 - sum_i p(v_i), kept as its logarithm
    student     the same ids: q(v_1) ... q(v_k), q(rest) = sum over the other ids

Merging outcomes is what a channel does: every f-divergence (both KL, JSD, skewed KL, total
variation) between the cut distributions is at most that between the whole ones, and 0 where that
is 0. Dropping the rest instead, or dividing by the mass that is kept, gives a loss that the teacher
itself does not minimise. With k = V there is no rest, and nothing is cut.
"""

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.types import Array, Sequences


@flax.struct.dataclass
class Cut(Sequences):
    """Given responses with the teacher's cut distribution at every token, read before."""

    ids: Array  # [B, N, k] int32
    log_p: Array  # [B, N, k + 1] float32, the rest last; [B, N, V] with k = V


def likeliest(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest ids [..., k], and log p of those and of the rest [..., k + 1].

    With k = V, the number of logits [..., V], there is no rest: [..., V].
    """
    ids = jax.lax.top_k(logits, k)[1]
    return ids, jax.nn.log_softmax(cut(logits, ids))


def cut(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [..., V] as those of the outcomes `ids` [..., k] and the rest: [..., k + 1], float32.

    The logit of the rest is log sum_v exp(z_v) over the ids that are left, so the softmax of the
    result is the cut distribution. It is summed over those alone: 1 - sum_i p(v_i) would lose all
    digits where the likeliest have almost all of the mass.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    left = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(left, axis=-1, keepdims=True)
    return jnp.concatenate([chosen, rest], axis=-1)
