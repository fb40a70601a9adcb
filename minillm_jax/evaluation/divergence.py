"""How far a student is from the teacher: exact per-token divergences on given responses."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from minillm_jax.evaluation import overlap
from minillm_jax.models import DecoderConfig, head
from minillm_jax.objectives import reduce, vocab
from minillm_jax.rollout import own_states, response_states
from minillm_jax.types import Params, Sequences

# What `sums` returns per response, besides its number of tokens; and per token.
KEYS = ("reverse_kl", "forward_kl", "log_q", "log_p", "entropy")
TOKEN_KEYS = ("log_ratio", "forward_kl_at")


@partial(jax.jit, static_argnames=("student", "teacher", "size", "dtype", "k", "most"))
def sums(
    student: DecoderConfig,
    teacher: DecoderConfig,
    params: Params,
    teacher_params: Params,
    batch: Sequences,
    size: int,
    dtype: str = "float32",
    k: int = 0,
    most: int | None = None,
) -> dict[str, jax.Array]:
    """Sums over the tokens of each response, [B] each, and their number as `tokens`.

    `reverse_kl` is KL[q || p], `forward_kl` KL[p || q], exact over the first `size` ids at every
    position of the response, both models reading the same prefix; the student in `dtype`, the
    teacher in that of its parameters. Per token, [B, N]: `log_ratio`, log(p / q) of the token, and
    `forward_kl_at`, both 0 in padding. With `k`, the sums of `overlap` with the teacher's k
    likeliest ids and of the `mass` on them, too. The states of a `Written` batch are the student's.
    """
    q_head, p_head = head(student, params), head(teacher, teacher_params)
    own = teacher_params["embed"]["tokens"].dtype
    q_states = own_states(student, params, batch, dtype=dtype, most=most)
    p_states = response_states(teacher, teacher_params, batch, dtype=own, most=most)
    score = vocab.scores(
        q_states,
        q_head.weight,
        q_head.bias,
        p_states,
        p_head.weight,
        p_head.bias,
        batch.response,
        mask=batch.response_mask,
        vocab_size=size,
    )
    mask = batch.response_mask
    summed = {name: score[name] for name in KEYS}
    if k:
        summed |= overlap.by_token((q_head, p_head), (q_states, p_states), size, k)
    rows = {name: reduce.keep(value, mask).sum(axis=1) for name, value in summed.items()}
    tokens = {"log_ratio": score["log_p"] - score["log_q"], "forward_kl_at": score["forward_kl"]}
    return rows | tokens | {"tokens": mask.sum(axis=1)}


@partial(jax.jit, static_argnames=("config", "size", "dtype", "max_tokens", "most"))
def answer_nll(
    config: DecoderConfig,
    params: Params,
    batch: Sequences,
    size: int,
    dtype: str = "float32",
    max_tokens: int | None = None,
    most: int | None = None,
) -> jax.Array:
    """-log q summed over each given response, [B], over the first `size` ids.

    `max_tokens` and `most` are those of `response_states`.
    """
    mask = batch.response_mask
    reads = {"max_tokens": max_tokens, "most": most}
    hidden = response_states(config, params, batch, dtype=dtype, **reads)
    top = head(config, params)
    alone = (hidden, top.weight, top.bias, None, None, None, batch.response)
    log_q = vocab.scores(*alone, mask=mask, vocab_size=size)["log_q"]
    return -reduce.keep(log_q, mask).sum(axis=1)


def per_token(rows: dict[str, np.ndarray], name: str) -> tuple[float, float]:
    """Mean over tokens of `name` from per-response sums [R], and its standard error.

    Tokens of one response are not independent, responses are: the error is that of a ratio of
    sums over responses (Cochran, Sampling Techniques, eq. 2.46).
    """
    value, tokens = np.asarray(rows[name], np.float64), np.asarray(rows["tokens"], np.float64)
    mean = value.sum() / max(tokens.sum(), 1)
    count = len(value)
    if count < 2:
        return float(mean), 0.0
    residual = value - mean * tokens
    error = np.sqrt(np.square(residual).sum() / (count - 1) / count) / max(tokens.mean(), 1e-9)
    return float(mean), float(error)


def stack(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Per-response sums of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
