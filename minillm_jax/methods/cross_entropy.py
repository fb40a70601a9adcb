"""The cross-entropy that SFT and MiniLLM's corpus loss share, from hidden states in blocks.

    (1 - k) (-log q(y_t | y_<t)) + k (-sum_v p(v | y_<t) log q(v | y_<t))

k = `kd_ratio` is the teacher's share: with k = 0 there is no teacher, and none needs to run.
"""

from functools import partial

import jax

from minillm_jax.models import DecoderConfig, head
from minillm_jax.objectives import reduce, vocab
from minillm_jax.types import Array, InputError, Params


def check_kd_ratio(kd_ratio: float) -> None:
    """Refuse, with InputError, a share of the teacher outside [0, 1]."""
    if not 0 <= kd_ratio <= 1:
        raise InputError(f"kd_ratio={kd_ratio}: the teacher's share must be from 0 to 1")


def sums(
    student: DecoderConfig,
    params: Params,
    hidden: jax.Array,  # [B, N, Dq]
    labels: Array,  # [B, N]
    mask: Array,  # [B, N]
    *,
    size: int,
    kd_ratio: float = 0.0,
    teacher: DecoderConfig | None = None,
    teacher_params: Params = None,
    teacher_hidden: jax.Array | None = None,  # [B, N, Dp]
    short: bool = False,
) -> dict[str, reduce.Pair]:
    """(sum, count) over real tokens of the "loss" above and of its "nll" -log q(y_t).

    With a teacher also of "forward_kl", KL[p || q]. Only "loss" has a gradient, and that to the
    student alone. No [B, N, V] array is formed.

    Args:
        size: ids of the true vocabulary.
        teacher, teacher_params, teacher_hidden: needed with `kd_ratio` > 0, unused without.
        short: as for `vocab.loss_sum`.
    """
    q, p = head(student, params, hidden.dtype), None
    if kd_ratio > 0:
        if teacher is None or teacher_hidden is None:
            raise ValueError(f"kd_ratio={kd_ratio} needs a teacher and its hidden states")
        p = head(teacher, teacher_params, teacher_hidden.dtype)
    with jax.named_scope("vocabulary"):
        summed, scores = vocab.loss_sum(
            partial(_per_token, kd_ratio),
            hidden,
            q.weight,
            q.bias,
            teacher_hidden if p else None,
            p.weight if p else None,
            p.bias if p else None,
            labels,
            mask,
            vocab_size=size,
            short=short,
        )
    nll = reduce.total(-scores["log_q"], mask)
    pairs = {"loss": reduce.Pair(summed, nll.count), "nll": nll}
    if p:
        pairs["forward_kl"] = reduce.total(scores["forward_kl"], mask)
    return pairs


def _per_token(kd_ratio: float, scores: vocab.Scores, extras, mask) -> jax.Array:
    return vocab.mixed_cross_entropy(scores, kd_ratio)
