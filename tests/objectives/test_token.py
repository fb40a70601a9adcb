from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from minillm_jax.objectives import reduce, token

Q, P = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
DIVERGENCES = {
    "forward_kl": token.forward_kl,
    "reverse_kl": token.reverse_kl,
    "jsd": lambda q, p: token.jsd(q, p, 0.3),
    "skew_forward_kl": lambda q, p: token.skew_forward_kl(q, p, 0.1),
    "skew_reverse_kl": lambda q, p: token.skew_reverse_kl(q, p, 0.1),
    "total_variation": token.total_variation,
}
each = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def pair(seed=0, shape=(2, 3, 7), dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for _ in range(2))


def kl(a, b):
    return float(np.sum(a * np.log(a / b)))


def test_hand_values_and_directions():
    q, p = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.2, 0.05, 0.05, 0.7])
    mixed = 0.3 * p + 0.7 * q
    want = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, mixed) + 0.7 * kl(q, mixed),
        "skew_forward_kl": kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
        "total_variation": np.abs(q - p).sum() / 2,
    }
    assert abs(want["forward_kl"] - want["reverse_kl"]) > 0.1
    # Log-probabilities, and logits that are off by a constant.
    for shift in (0.0, 3.0):
        for name, divergence in DIVERGENCES.items():
            got = divergence(jnp.log(q) + shift, jnp.log(p) - shift)
            np.testing.assert_allclose(got, want[name], rtol=2e-5, err_msg=name)


def test_single_distribution_by_hand():
    logits, labels = jnp.log(jnp.asarray([Q, P])) + 1.5, jnp.asarray([0, 1])
    np.testing.assert_allclose(token.log_prob_of(logits, labels), np.log([0.5, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(token.cross_entropy(logits, labels), -np.log([0.5, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(token.entropy(logits), [1.5 * np.log(2)] * 2, rtol=1e-6)
    soft = token.soft_cross_entropy(logits[:1], logits[1:])
    np.testing.assert_allclose(soft, [-(P * np.log(Q)).sum()], rtol=1e-6)
    mixed = token.corpus(logits[:1], logits[1:], labels[:1], 0.25)
    np.testing.assert_allclose(mixed, 0.75 * np.log(2) + 0.25 * soft, rtol=1e-6)


@each
def test_teacher_equal_to_student_is_zero(divergence):
    q, _ = pair()
    np.testing.assert_allclose(divergence(q, q + 1), np.zeros(q.shape[:-1]), atol=3e-7)


@each
def test_gradients_in_both_arguments(divergence):
    with jax.enable_x64(True):
        check_grads(divergence, pair(2, (2, 4), np.float64), order=1, modes=["rev"], rtol=1e-6)


def test_gradient_of_reverse_kl_where_the_teacher_is_cut():
    """The hand-written gradient against autodiff of the same sum, with -inf on both sides."""
    with jax.enable_x64(True):
        q, p = pair(3, (4, 6), np.float64)
        q, p = q.at[1, 2].set(-jnp.inf), p.at[:2, 4].set(-jnp.inf).at[3, :3].set(-jnp.inf)
        weight = jnp.asarray([1.0, 2.0, 3.0, 4.0])

        def plain(q, p):
            return weight @ token._kl(token._log_softmax(q), token._log_softmax(p))

        want = jax.grad(plain, argnums=(0, 1))(q, p)
        got = jax.grad(lambda q, p: weight @ token.reverse_kl(q, p), argnums=(0, 1))(q, p)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@each
def test_minus_infinity_contributes_nothing(divergence):
    """One id that neither has, one of q's alone, one of p's alone: finite, and no NaN gradient."""
    q, p = pair(4, (1, 6))
    q, p = q.at[0, :2].set(-jnp.inf), p.at[0, 1:3].set(-jnp.inf)
    value, grads = jax.value_and_grad(lambda q, p: divergence(q, p)[0], argnums=(0, 1))(q, p)
    assert np.isfinite(value)
    for grad in grads:
        assert np.all(np.isfinite(grad))
    both = divergence(q.at[0, 0].set(0.5), p.at[0, 2].set(0.5))
    cut = divergence(jnp.delete(q.at[0, 0].set(0.5), 1, 1), jnp.delete(p.at[0, 2].set(0.5), 1, 1))
    np.testing.assert_allclose(both, cut, rtol=1e-5)


def test_entropies_with_minus_infinity():
    logits = jnp.asarray([0.0, 0.0, -jnp.inf])
    value, grad = jax.value_and_grad(token.entropy)(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert np.all(np.isfinite(grad))
    assert np.isfinite(token.soft_cross_entropy(logits, jnp.zeros(3)))


def test_jsd_ends_are_the_scaled_limits():
    """beta = 0 is forward KL and 1 reverse KL, as in GKD; EasyDeL has them the wrong way round."""
    with jax.enable_x64(True):
        q, p = pair(5, dtype=np.float64)
        near = 1e-7
        forward, reverse = token.forward_kl(q, p), token.reverse_kl(q, p)
        np.testing.assert_allclose(token.jsd(q, p, near) / near, forward, rtol=1e-4)
        np.testing.assert_allclose(token.jsd(q, p, 1 - near) / near, reverse, rtol=1e-4)
        np.testing.assert_array_equal(token.jsd(q, p, 0.0), forward)
        np.testing.assert_array_equal(token.jsd(q, p, 1.0), reverse)
        np.testing.assert_allclose(token.jsd(q, p, 0.5), token.jsd(p, q, 0.5), rtol=1e-12)
    with pytest.raises(ValueError, match="beta=1.5"):
        token.jsd(q, p, 1.5)


def test_skew_zero_is_the_divergence_itself():
    q, p = pair(6)
    np.testing.assert_allclose(token.skew_forward_kl(q, p, 0), token.forward_kl(q, p), rtol=1e-5)
    np.testing.assert_allclose(token.skew_reverse_kl(q, p, 0), token.reverse_kl(q, p), rtol=1e-5)


@each
def test_garbage_in_blanked_padding(divergence):
    q, p = pair(7)
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)

    def loss(q, p):
        return reduce.total(divergence(reduce.keep(q, mask), reduce.keep(p, mask)), mask).sum

    want = jax.value_and_grad(loss, argnums=(0, 1))(q, p)
    dirty = [jnp.where(mask[..., None], x, jnp.nan) for x in (q, p)]
    got = jax.value_and_grad(loss, argnums=(0, 1))(*dirty)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_low_precision_is_computed_in_float32():
    q, p = pair(8)
    q, p = q.astype(jnp.bfloat16), p.astype(jnp.bfloat16)
    got = token.reverse_kl(q, p)
    assert got.dtype == token.entropy(q).dtype == jnp.float32
    wide = token.reverse_kl(q.astype(jnp.float32), p.astype(jnp.float32))
    np.testing.assert_array_equal(got, wide)
    assert jax.grad(lambda q: token.reverse_kl(q, p).sum())(q).dtype == jnp.bfloat16
