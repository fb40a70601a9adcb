"""MiniLLM's loss L_PT on plain text, which keeps what pre-training taught (arXiv 2306.08543, 2.3).

    L_PT = (1 - k) (-log q(d_t | d_<t)) + k (-sum_v p(v | d_<t) log q(v | d_<t))

a mean over the targets of all blocks, T - 1 in T tokens without padding. k = 0 is the paper's, 0.5
the reference's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.methods import cross_entropy
from minillm_jax.models import DecoderConfig, hidden_states
from minillm_jax.objectives import reduce
from minillm_jax.types import InputError, Params


@dataclass(frozen=True)
class CorpusLoss:
    """`coefficient` * L_PT is added to the loss; `kd_ratio` is the teacher's share k of L_PT."""

    coefficient: float = 1.0
    kd_ratio: float = 0.0

    def __post_init__(self):
        """Refuse, with InputError, what is no weight of a loss."""
        if not 0 <= self.coefficient < float("inf"):
            raise InputError(f"coefficient={self.coefficient}: it must be 0 or more, and finite")
        cross_entropy.check_kd_ratio(self.kd_ratio)


def sums(
    loss: CorpusLoss,
    student: DecoderConfig,
    teacher: DecoderConfig,
    params: Params,
    teacher_params: Params,
    tokens: jax.Array,  # [B, T], below 0 in padding
    *,
    size: int,
    dtype: str,
    remat: str = "none",
    most: int | None = None,
) -> reduce.Pair:
    """(sum, count) of L_PT over the targets of blocks; the teacher runs only if k > 0.

    The teacher's arithmetic is in the type of its parameters, as in a collection. `most` is that
    of `hidden_states`.
    """

    def read(config, params, dtype, remat="none"):
        options = {"dtype": dtype, "remat": remat, "most": most}
        # The last state predicts what is beyond the block.
        return hidden_states(config, params, tokens, real, **options)[:, :-1]

    real = tokens >= 0
    tokens = jnp.where(real, tokens, 0)
    states = None
    if loss.kd_ratio > 0:
        states = read(teacher, teacher_params, teacher_params["embed"]["tokens"].dtype)
    return cross_entropy.sums(
        student,
        params,
        read(student, params, dtype, remat),
        tokens[:, 1:],
        real[:, 1:],
        size=size,
        kd_ratio=loss.kd_ratio,
        teacher=teacher,
        teacher_params=teacher_params,
        teacher_hidden=states,
    )["loss"]


def share(tokens: Any, count: jax.Array) -> jax.Array:
    """What a sum over corpus targets is multiplied by to count as a mean in a sum over `count`.

    (S + share S_PT) / count = S / count + S_PT / targets: two means of unequal counts add up in
    one sum, and so over micro-batches. `tokens` [B, T] and `count` are those of the update.
    """
    targets = jnp.sum(tokens[:, 1:] >= 0)
    return jnp.maximum(count, 1) / jnp.maximum(targets, 1)
