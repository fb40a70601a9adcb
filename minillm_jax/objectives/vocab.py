"""Scores of drawn tokens from hidden states, in blocks of tokens: no [B, N, V] array persists.

`scores` returns per-token values and recomputes the logits of a block in its backward sweep.
`loss_sum` takes the loss as a function of those values, so the gradient is formed while the logits
of the block are at hand: four products with the heads instead of six; and any divergence of `token`
as a function of the block's logits. Both go without a teacher.

A block spans all rows and a few positions, so a batch sharded over rows, and heads over V, stay so;
the head's gradient is summed over the devices once (`blocks`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from minillm_jax.objectives.blocks import (
    Blocks,
    HeadGrad,
    add_grad,
    apart,
    no_grad,
    over,
    whole_grad,
)
from minillm_jax.objectives.reduce import keep, row_sums, total
from minillm_jax.types import Array

Scores = dict[str, jax.Array]
Divergence = Callable[[jax.Array, jax.Array, Any], jax.Array]  # z_q, z_p [R, V], extras -> [R]
Model = tuple[jax.Array, jax.Array, jax.Array | None]  # hidden [n, R, D], weight [V, D], bias [V]


def scores(
    hidden_q: Array,  # [B, N, Dq]
    weight_q: Array,  # [V, Dq]
    bias_q: Array | None,  # [V]
    hidden_p: Array | None,  # [B, N, Dp]
    weight_p: Array | None,  # [V, Dp]
    bias_p: Array | None,  # [V]
    labels: Array,  # [B, N]
    mask: Array,  # [B, N]
    *,
    vocab_size: int | None = None,
    block: int | None = None,
) -> Scores:
    """Per-token [B, N] values of z = h W^T + b: "log_q" and "log_p" of the labels, "reverse_kl"
    KL[q || p], "forward_kl" KL[p || q], "entropy" of q and "teacher_entropy" of p. With None for
    all three of the teacher: "log_q" alone.

    Equal to `token` on the full logits, in float32 (float64 for such hidden states); 0 in padding,
    whatever the hidden states hold there. Gradient to `hidden_q`, `weight_q`, `bias_q`; none to p.

    Args:
        vocab_size: ids of the true vocabulary, where heads have more rows; default: the smaller.
        block: tokens, over the rows of a device, whose logits exist at a time; None: what is best
            on these devices.
    """
    cut = Blocks(labels, block)
    size = _size(weight_q, weight_p, vocab_size)
    student = _model(cut, hidden_q, weight_q, bias_q, mask, size)
    teacher = _teacher(cut, hidden_p, weight_p, bias_p, mask, size)
    labels = cut.split(keep(labels, mask))
    out: Any = _scores(cut.ways, student, lax.stop_gradient(teacher), labels, None)
    return {name: keep(cut.join(value), mask) for name, value in out.items()}


def loss_sum(
    loss: Callable[[Scores, Any, jax.Array], jax.Array],
    hidden_q: Array,  # [B, N, Dq]
    weight_q: Array,  # [V, Dq]
    bias_q: Array | None,  # [V]
    hidden_p: Array | None,  # [B, N, Dp]
    weight_p: Array | None,  # [V, Dp]
    bias_p: Array | None,  # [V]
    labels: Array,  # [B, N]
    mask: Array,  # [B, N]
    extras: Any = (),
    *,
    divergence: Divergence | None = None,
    vocab_size: int | None = None,
    block: int | None = None,
    short: bool = False,
) -> tuple[jax.Array, Scores]:
    """Sum over the real tokens of `loss(scores, extras, mask)`, and the scores without gradient.

    The gradient of the sum reaches what that of `scores` reaches, a third cheaper. Without a
    gradient wanted it costs the scores.

    Args:
        loss: per-token values [W, R] of W R tokens, each from its own token's scores and extras; it
            must not close over traced values.
        extras: a pytree of [B, N] constants of the loss, such as `policy.Targets`.
        divergence: a further score, "divergence", differentiated by jax; no traced closure either.
        vocab_size, block: as for `scores`.
        short: read no block beyond the longest row; how many that are is then known at run time.
    """
    cut = Blocks(labels, block)
    size = _size(weight_q, weight_p, vocab_size)
    student = _model(cut, hidden_q, weight_q, bias_q, mask, size)
    teacher = _teacher(cut, hidden_p, weight_p, bias_p, mask, size)
    fixed = jax.tree.map(cut.split, (keep(labels, mask), mask.astype(bool), extras))
    filled = cut.filled(mask) if short and cut.blocks > 1 else None
    frozen = lax.stop_gradient((teacher, fixed, filled))
    result: Any = _loss_sum(loss, divergence, cut.ways, student, *frozen)
    value, out = result
    return value, {name: keep(cut.join(x), mask) for name, x in lax.stop_gradient(out).items()}


def mixed_cross_entropy(scores: Scores, kd_ratio: float) -> jax.Array:
    """(1 - k) (-log q(y)) + k (-sum_v p_v log q_v) of `scores`: `token.corpus` in blocks.

    -sum p log q = KL[p || q] + H[p]. With k = 0 the scores need no teacher.
    """
    if kd_ratio == 0:
        return -scores["log_q"]
    soft = scores["forward_kl"] + scores["teacher_entropy"]
    return kd_ratio * soft - (1 - kd_ratio) * scores["log_q"]


def _model(cut: Blocks, hidden, weight, bias, mask, size: int) -> Model:
    chex.assert_rank([hidden, weight], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    chex.assert_equal(hidden.shape[-1], weight.shape[-1])
    bias = None if bias is None else bias[:size]
    return cut.split(keep(hidden, mask)), weight[:size].astype(hidden.dtype), bias


def _teacher(cut: Blocks, hidden, weight, bias, mask, size: int) -> Model | None:
    return None if hidden is None else _model(cut, hidden, weight, bias, mask, size)


def _size(weight_q: Array, weight_p: Array | None, vocab_size: int | None) -> int:
    shared = min(len(w) for w in (weight_q, weight_p) if w is not None)
    if vocab_size is not None and not 0 < vocab_size <= shared:
        raise ValueError(f"vocab_size={vocab_size}, but the heads have {shared} ids in common")
    return vocab_size or shared


def _both(x: Any, student: Model, teacher: Model | None) -> tuple[jax.Array, jax.Array | None]:
    """Logits of q and p, or None, from the hidden states of a block."""
    hidden_q, hidden_p = x
    z_q = _logits(hidden_q, *student[1:])
    return z_q, None if teacher is None else _logits(hidden_p, *teacher[1:])


def _hidden(student: Model, teacher: Model | None) -> tuple[jax.Array, jax.Array | None]:
    return student[0], None if teacher is None else teacher[0]


def _logits(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:  # [R, V]
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    z = lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return z if bias is None else z + bias.astype(dtype)[None]


def _sum(x: jax.Array) -> jax.Array:
    """Row sums [R, V] -> [R]; as a product with ones, twice as fast on XLA's CPU backend."""

    def product(x):
        return jnp.matmul(x, jnp.ones((x.shape[1],), x.dtype), precision="highest")

    return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, axis=1))


def _block(z_q: jax.Array, z_p: jax.Array | None, labels: jax.Array) -> tuple[Scores, Scores]:
    """The scores [R] of logits [R, V], and the log-normalisers of q and p."""

    def chosen(z):
        return jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]

    top_q = z_q.max(1, keepdims=True)
    z_q = z_q - top_q
    e_q = jnp.exp(z_q)
    sum_q = _sum(e_q)
    log_sum_q = jnp.log(sum_q)
    if z_p is None:
        return {"log_q": chosen(z_q) - log_sum_q}, {"q": top_q[:, 0] + log_sum_q}
    top_p = z_p.max(1, keepdims=True)
    z_p = z_p - top_p
    e_p, gap = jnp.exp(z_p), z_q - z_p
    sum_p = _sum(e_p)
    log_sum_p = jnp.log(sum_p)
    out = {
        "log_q": chosen(z_q) - log_sum_q,
        "log_p": chosen(z_p) - log_sum_p,
        "reverse_kl": _sum(e_q * gap) / sum_q - log_sum_q + log_sum_p,
        "forward_kl": log_sum_q - log_sum_p - _sum(e_p * gap) / sum_p,
        "entropy": log_sum_q - _sum(e_q * z_q) / sum_q,
        "teacher_entropy": log_sum_p - _sum(e_p * z_p) / sum_p,
    }
    return out, {"q": top_q[:, 0] + log_sum_q, "p": top_p[:, 0] + log_sum_p}


def _grad_logits(
    z_q: jax.Array, z_p: jax.Array | None, labels: jax.Array, out: Scores, norm: Scores, bar: Scores
) -> jax.Array:
    """d/dz_q [R, V] of sum_k bar_k out_k, with g = log q - log p and H the entropy of q:

    q_v [rkl (g_v - KL) - ent (log q_v + H) + fkl - log_q] - fkl p_v + log_q [v = label]
    """
    col = {name: x[:, None] for name, x in bar.items()}
    log_q = z_q - norm["q"][:, None]
    here = labels[:, None] == lax.broadcasted_iota(jnp.int32, (1, z_q.shape[1]), 1)
    if z_p is None:
        return jnp.where(here, col["log_q"], 0) - col["log_q"] * jnp.exp(log_q)
    log_p = z_p - norm["p"][:, None]
    shift = bar["forward_kl"] - bar["log_q"] - bar["reverse_kl"] * out["reverse_kl"]
    shift = (shift - bar["entropy"] * out["entropy"])[:, None]
    grad = col["reverse_kl"] * (log_q - log_p) - col["entropy"] * log_q + shift
    grad = jnp.exp(log_q) * grad - col["forward_kl"] * jnp.exp(log_p)
    return grad + jnp.where(here, col["log_q"], 0)


def _grad_head(grad: jax.Array, hidden: jax.Array, student: Model, carry: HeadGrad, ways: int):
    """Adds a block's share to the head's gradient `carry`; with it d hidden [R, D]."""
    back = jnp.matmul(grad.astype(hidden.dtype), student[1], preferred_element_type=grad.dtype)
    return add_grad(carry, grad, hidden, ways), back.astype(hidden.dtype)


def _like(student: Model, grad_hidden: jax.Array, carry: HeadGrad, scale: jax.Array | float):
    """Cotangents of the student in its own dtypes."""
    (_, weight, bias), (grad_weight, grad_bias) = student, whole_grad(carry)
    if bias is not None and grad_bias is not None:
        bias = (grad_bias * scale).astype(bias.dtype)
    grad_hidden = (grad_hidden * scale).astype(grad_hidden.dtype)
    return grad_hidden, (grad_weight * scale).astype(weight.dtype), bias


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    ways: int, student: Model, teacher: Model | None, labels: jax.Array, filled: jax.Array | None
) -> Scores:
    return _scores_fwd(ways, student, teacher, labels, filled)[0]


def _scores_fwd(ways, student, teacher, labels, filled):
    def step(_, x):
        hidden, label = x
        return None, _block(*_both(hidden, student, teacher), label)

    _, (out, norm) = over(step, None, (_hidden(student, teacher), labels), filled)
    return out, (student, teacher, filled, labels, out, norm)


def _scores_bwd(ways, residuals, bar):
    student, teacher, filled, *rest = residuals

    def step(carry, x):
        hidden, *rest = x
        z_q, z_p = _both(hidden, student, teacher)
        return _grad_head(_grad_logits(z_q, z_p, *rest), hidden[0], student, carry, ways)

    parts = _hidden(student, teacher), *rest, bar
    carry, grad_hidden = over(step, no_grad(student[1], student[2], ways), parts, filled)
    return _like(student, grad_hidden, carry, 1), None, None, None


_scores.defvjp(_scores_fwd, _scores_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss_sum(loss, divergence, ways, student, teacher, fixed, filled) -> tuple[jax.Array, Scores]:
    if divergence:  # what no gradient needs is dropped by the compiler
        return _loss_sum_fwd(loss, divergence, ways, student, teacher, fixed, filled)[0]
    labels, mask, extras = fixed
    out: Any = _scores(ways, student, teacher, labels, filled)
    return total(loss(out, extras, mask), mask).sum, out


def _loss_sum_fwd(loss, divergence, ways, student, teacher, fixed, filled):
    def step(carry, x):
        hidden, (labels, mask, extras) = x
        z_q, z_p = _both(hidden, student, teacher)
        out, norm = _block(z_q, z_p, labels)
        back: Any = None
        if divergence:
            out["divergence"], back = jax.vjp(lambda z: divergence(z, z_p, extras), z_q)

        def summed(out):  # [W], for the rows of each device
            row, own, extra = jax.tree.map(lambda x: apart(x, ways), (out, mask, extras))
            return row_sums(loss(row, extra, own), own)

        value, pull = jax.vjp(summed, out)
        (bar,) = pull(jnp.ones_like(value))
        grad = _grad_logits(z_q, z_p, labels, out, norm, bar)
        if back:
            grad += back(bar["divergence"])[0]
        carry, grad_hidden = _grad_head(grad, hidden[0], student, carry, ways)
        return carry, (value, out, grad_hidden)

    parts = _hidden(student, teacher), fixed
    start = no_grad(student[1], student[2], ways)
    carry, (value, out, grad_hidden) = over(step, start, parts, filled)
    return (value.sum(), out), (student[1:], grad_hidden, carry)


def _loss_sum_bwd(loss, divergence, ways, residuals, bar):
    head, grad_hidden, carry = residuals
    return _like((grad_hidden, *head), grad_hidden, carry, bar[0]), None, None, None


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd)
