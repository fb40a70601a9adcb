"""Losses and divergences of one position, per token and unreduced.

Arguments are logits or log-probabilities [..., V] (a log-softmax leaves log-probabilities as they
are), student q before teacher p. Results have the shape [...] and the input's float type, at least
float32. An entry whose log-probability is -inf contributes 0 to every sum, as in the reference
code, so cut distributions (top-p) give finite values. Blank padding first: `reduce.keep`.
"""

import chex
import jax
import jax.numpy as jnp

from minillm_jax.types import Array


def log_prob_of(logits: Array, labels: Array) -> jax.Array:
    """log q(y_t) of labels [...] under logits [..., V]."""
    chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
    chosen = jnp.take_along_axis(_log_softmax(logits), labels[..., None], axis=-1)
    return chosen[..., 0]


def cross_entropy(logits: Array, labels: Array) -> jax.Array:
    """-log q(y_t) of labels [...] under logits [..., V]."""
    return -log_prob_of(logits, labels)


def soft_cross_entropy(logits_q: Array, logits_p: Array) -> jax.Array:
    """-sum_v p_v log q_v, the teacher's soft targets."""
    log_q, log_p = _pair(logits_q, logits_p)
    return -_expected(log_p, log_q)


def corpus(logits_q: Array, logits_p: Array, labels: Array, kd_ratio: float) -> jax.Array:
    """(1 - k) CE(labels) + k (-sum p log q): L_PT of MiniLLM on its corpus, and the KD baseline."""
    hard, soft = cross_entropy(logits_q, labels), soft_cross_entropy(logits_q, logits_p)
    return (1 - kd_ratio) * hard + kd_ratio * soft


def entropy(logits: Array) -> jax.Array:
    """-sum_v q_v log q_v."""
    log_q = _log_softmax(logits)
    return -_expected(log_q, log_q)


def forward_kl(logits_q: Array, logits_p: Array) -> jax.Array:
    """KL[p || q] = sum_v p_v (log p_v - log q_v): mean-seeking."""
    log_q, log_p = _pair(logits_q, logits_p)
    return _kl(log_p, log_q)


def reverse_kl(logits_q: Array, logits_p: Array) -> jax.Array:
    """KL[q || p] = sum_v q_v (log q_v - log p_v): mode-seeking.

    d/dz_v = q_v (log q_v - log p_v - KL) for student logits z, written out so that only the logits
    are kept for it, not three more arrays of their size.
    """
    logits_q, logits_p = _same(logits_q, logits_p)
    return _reverse_kl(logits_q, logits_p)


def jsd(logits_q: Array, logits_p: Array, beta: float) -> jax.Array:
    """beta KL[p || m] + (1 - beta) KL[q || m], m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    Like beta KL[p || q] as beta -> 0 and like (1 - beta) KL[q || p] as beta -> 1; at the ends
    themselves those two divergences are returned, unscaled, as GKD names them.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd: beta={beta} is outside [0, 1]")
    if beta == 0:
        return forward_kl(logits_q, logits_p)
    if beta == 1:
        return reverse_kl(logits_q, logits_p)
    log_q, log_p = _pair(logits_q, logits_p)
    log_m = _log_blend(log_q, log_p, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_forward_kl(logits_q: Array, logits_p: Array, skew: float) -> jax.Array:
    """KL[p || skew p + (1 - skew) q] (DistiLLM, arXiv 2402.03898, eq. 3); skew 0: forward KL."""
    log_q, log_p = _pair(logits_q, logits_p)
    return _kl(log_p, _log_blend(log_q, log_p, skew))


def skew_reverse_kl(logits_q: Array, logits_p: Array, skew: float) -> jax.Array:
    """KL[q || (1 - skew) p + skew q] (DistiLLM, arXiv 2402.03898); skew 0: reverse KL."""
    log_q, log_p = _pair(logits_q, logits_p)
    return _kl(log_q, _log_blend(log_q, log_p, 1 - skew))


def total_variation(logits_q: Array, logits_p: Array) -> jax.Array:
    """(1/2) sum_v |q_v - p_v|, in [0, 1]."""
    log_q, log_p = _pair(logits_q, logits_p)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_q) - jnp.exp(log_p)), axis=-1)


def adaptive_kl(logits_q: Array, logits_p: Array, mu: float) -> jax.Array:
    """(g_h KL[p || q] + g_t KL[q || p]) / (g_h + g_t) (AKL, arXiv 2404.02657).

    g_h is sum_v |p_v - q_v| over the head of p, g_t that over its tail; both are weights, without
    gradient. The head is the most probable ids whose mass together is at most `mu`, and always the
    most probable one; ids of equal probability are in it together or not at all.
    """
    log_q, log_p = _pair(logits_q, logits_p)
    p = jax.lax.stop_gradient(jnp.exp(log_p))
    gap = jnp.abs(p - jax.lax.stop_gradient(jnp.exp(log_q)))
    head = _head(p, mu)
    in_head = jnp.sum(jnp.where(head, gap, 0), axis=-1)
    in_tail = jnp.sum(jnp.where(head, 0, gap), axis=-1)
    both = in_head + in_tail
    share = jnp.where(both > 0, in_head / jnp.where(both > 0, both, 1), 0.5)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def _head(p: jax.Array, mu: float) -> jax.Array:
    """Which ids of p [..., V] are in its head, by bisection: sorting a vocabulary is slow.

    Positive floats are ordered as their bits are, so halving the bits finds the least probability
    exactly, in as many sweeps as there are bits.
    """
    kind = jnp.int64 if p.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(p, kind)

    def fits(least):  # [...]
        return jnp.sum(jnp.where(bits >= least[..., None], p, 0), axis=-1) <= mu

    def halve(_, ends):
        below, above = ends  # `above` fits, `below` does not
        middle = below + (above - below) // 2
        good = fits(middle)
        return jnp.where(good, below, middle), jnp.where(good, middle, above)

    top = bits.max(axis=-1)
    ends = jnp.full_like(top, -1), top + 1
    steps = jnp.iinfo(kind).bits - 1
    least = jnp.minimum(jax.lax.fori_loop(0, steps, halve, ends)[1], top)
    return bits >= least[..., None]


def _log_softmax(logits: Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _same(logits_q: Array, logits_p: Array) -> tuple[jax.Array, jax.Array]:
    chex.assert_equal_shape([logits_q, logits_p])
    dtype = jnp.promote_types(jnp.promote_types(logits_q.dtype, logits_p.dtype), jnp.float32)
    return jnp.asarray(logits_q, dtype), jnp.asarray(logits_p, dtype)


def _pair(logits_q: Array, logits_p: Array) -> tuple[jax.Array, jax.Array]:
    logits_q, logits_p = _same(logits_q, logits_p)
    return _log_softmax(logits_q), _log_softmax(logits_p)


def _finite(log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where it is not -inf, and itself with 0 there: the gradient of -inf * 0 is NaN."""
    real = log_prob > -jnp.inf
    return real, jnp.where(real, log_prob, 0)


def _expected(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """sum_v a_v log b_v."""
    real_a, _ = _finite(log_a)
    real_b, log_b = _finite(log_b)
    return jnp.sum(jnp.where(real_a & real_b, jnp.exp(log_a), 0) * log_b, axis=-1)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """KL[a || b]."""
    (real_a, finite_a), (real_b, finite_b) = _finite(log_a), _finite(log_b)
    weight = jnp.where(real_a & real_b, jnp.exp(log_a), 0)
    return jnp.sum(weight * (finite_a - finite_b), axis=-1)


def _log_blend(log_q: Array, log_p: Array, beta: float) -> jax.Array:
    """log(beta p + (1 - beta) q); -inf, without a NaN gradient, where both are."""
    top = jax.lax.stop_gradient(jnp.maximum(log_q, log_p))
    some, top = _finite(top)
    mass = beta * jnp.exp(log_p - top) + (1 - beta) * jnp.exp(log_q - top)
    some = some & (mass > 0)
    return jnp.where(some, jnp.log(jnp.where(some, mass, 1)) + top, -jnp.inf)


@jax.custom_vjp
def _reverse_kl(logits_q: Array, logits_p: Array) -> jax.Array:
    return _kl(_log_softmax(logits_q), _log_softmax(logits_p))


def _reverse_kl_fwd(logits_q, logits_p):
    return _reverse_kl(logits_q, logits_p), (logits_q, logits_p)


def _reverse_kl_bwd(residuals, cotangent):
    log_q, log_p = map(_log_softmax, residuals)
    (real_q, finite_q), (real_p, finite_p) = _finite(log_q), _finite(log_p)
    real, q = real_q & real_p, jnp.exp(log_q)
    gap = jnp.where(real, finite_q - finite_p, 0)
    kl = jnp.sum(q * gap, axis=-1, keepdims=True)
    # Where p cuts entries that q keeps, their mass is left out of the sum: `shared` < 1.
    counted = real.astype(q.dtype)
    shared = jnp.sum(q * counted, axis=-1, keepdims=True)
    cotangent = cotangent[..., None]
    grad_q = q * (gap - kl + counted - shared)
    grad_p = jnp.exp(log_p) * shared - q * counted
    return cotangent * grad_q, cotangent * grad_p


_reverse_kl.defvjp(_reverse_kl_fwd, _reverse_kl_bwd)
