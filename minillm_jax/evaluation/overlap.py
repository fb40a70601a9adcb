"""How far the student's first choices are the teacher's, on given responses.

Per token, with T_k(.) the k likeliest ids: |T_k(q) & T_k(p)| / k, and the mass that the student
gives the teacher's choices, sum_{v in T_k(p)} q_v. The first is what on-policy frameworks log as
overlap (verl #6469); the second is 1 where a student trained on the top k loses nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp

from minillm_jax.models import DecoderConfig, head, logits
from minillm_jax.rollout import response_states
from minillm_jax.types import Params, Sequences

KEYS = ("overlap", "mass")


@partial(jax.jit, static_argnames=("student", "teacher", "size", "k", "dtype"))
def sums(
    student: DecoderConfig,
    teacher: DecoderConfig,
    params: Params,
    teacher_params: Params,
    batch: Sequences,
    size: int,
    k: int,
    dtype: str = "float32",
) -> dict[str, jax.Array]:
    """Sums over the tokens of each response, [B] each, and their number as `tokens`.

    Over the first `size` ids, both models reading the same prefix. The logits of one position exist
    at a time, [B, V].
    """
    heads = head(student, params), head(teacher, teacher_params)
    own = teacher_params["embed"]["tokens"].dtype
    states = (
        response_states(student, params, batch, dtype=dtype),
        response_states(teacher, teacher_params, batch, dtype=own),
    )

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
    mask = batch.response_mask
    rows = {name: jnp.where(mask, found[name].T, 0).sum(axis=1) for name in KEYS}
    return rows | {"tokens": mask.sum(axis=1)}
