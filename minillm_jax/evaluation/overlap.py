"""How far the student's first choices are the teacher's, on given responses.

Per token, with T_k(.) the k likeliest ids: |T_k(q) & T_k(p)| / k, and the mass that the student
gives the teacher's choices, sum_{v in T_k(p)} q_v. The first is what on-policy frameworks log as
overlap (verl #6469); the second is 1 where a student trained on the top k loses nothing.
"""

import jax
import jax.numpy as jnp

from minillm_jax.models import Head, logits

KEYS = ("overlap", "mass")


def by_token(
    heads: tuple[Head, Head],
    states: tuple[jax.Array, jax.Array],  # [B, N, D] each
    size: int,
    k: int,
) -> dict[str, jax.Array]:
    """ "overlap" and "mass" at every token [B, N], student before teacher, over `size` ids.

    The logits of one position exist at a time, [B, V].
    """

    def at(position):
        z_q, z_p = (
            logits(top, hidden)[:, :size].astype(jnp.float32)
            for top, hidden in zip(heads, position, strict=True)
        )
        ids_q, ids_p = (jax.lax.top_k(z, k)[1] for z in (z_q, z_p))
        shared = (ids_q[:, :, None] == ids_p[:, None, :]).any(axis=2).mean(axis=1)
        mass = jnp.take_along_axis(jax.nn.softmax(z_q), ids_p, axis=1).sum(axis=1)
        return {"overlap": shared, "mass": mass}

    found = jax.lax.map(at, tuple(jnp.moveaxis(x, 1, 0) for x in states))  # [N, B] each
    return {name: value.T for name, value in found.items()}
