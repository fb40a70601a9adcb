"""Expected gradients over every answer of a toy language, summed exactly in float64.

Four ids, the last one ends the answer, at most three tokens: 40 answers, 13 states. The expectation
of what `policy` gives is compared with finite sums of the paper's equations, written here in numpy,
and, where the paper's estimator is unbiased, with the gradient of KL[q || p] over answers.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.objectives import policy as mini
from minillm_jax.objectives import reduce, token

V, T, END = 4, 3, 3
STATES = [s for n in range(T) for s in itertools.product(range(END), repeat=n)]
ANSWERS = [s + (END,) for s in STATES] + list(itertools.product(range(END), repeat=T))
ROWS = np.array([[STATES.index(y[:t]) if t < len(y) else 0 for t in range(T)] for y in ANSWERS])
TOKENS = np.array([[y[t] if t < len(y) else END for t in range(T)] for y in ANSWERS])
MASK = np.array([[t < len(y) for t in range(T)] for y in ANSWERS])


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(len(STATES), V))


OLD, TEACHER = table(0), table(1)
MOVED = OLD + table(2, 0.3)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def chance(probabilities) -> np.ndarray:
    """Probability of every answer under a table of next-token probabilities."""
    return np.where(MASK, probabilities[ROWS, TOKENS], 1.0).prod(-1)


def ours(policy, theta, alpha, fields=("policy", "single_step")) -> np.ndarray:
    """sum_y p~(y) d/dtheta sum_t loss_t(y), from the functions under test."""
    with jax.enable_x64(True):
        drawn = jnp.asarray(chance((1 - alpha) * softmax(OLD) + alpha * softmax(TEACHER)))

        def chosen(z):
            return token.log_prob_of(jnp.asarray(z)[ROWS], jnp.asarray(TOKENS))

        log_q_old, log_p = chosen(OLD), chosen(TEACHER)
        log_mix = mini.log_mixture(log_q_old, log_p, alpha)
        targets = mini.prepare(policy, log_p, log_q_old, log_mix, MASK)

        def loss(z):
            reverse_kl = token.reverse_kl(z[ROWS], jnp.asarray(TEACHER)[ROWS])
            values = mini.losses(policy, chosen(z), reverse_kl, targets, MASK)
            each = sum(values[field] for field in fields)
            return reduce.total(each * drawn[:, None], MASK).sum

        return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(theta)))


def papers(theta, alpha, length_norm, clip, discount=None) -> np.ndarray:
    """E over y ~ p~ of sum_t w_t (d KL_t + clipped R_{t+1} d log q), in loops, without autodiff.

    With a `discount` the return is the weighted mean of `corrected` in place of the plain one.
    """
    old, p, q = softmax(OLD), softmax(TEACHER), softmax(theta)
    mix = (1 - alpha) * old + alpha * p
    grad = np.zeros_like(theta)
    for y in ANSWERS:
        states = [STATES.index(y[:t]) for t in range(len(y))]
        weight = np.prod([mix[s, v] for s, v in zip(states, y, strict=True)])
        r = [np.log(p[s, v] / old[s, v]) for s, v in zip(states, y, strict=True)]
        for t, (s, v) in enumerate(zip(states, y, strict=True)):
            w = old[s, v] / mix[s, v]
            for u in range(V):
                d_qu = q[s, u] * (np.eye(V)[u] - q[s])
                grad[s] += weight * w * d_qu * (np.log(q[s, u] / p[s, u]) + 1)
            later = len(y) - t - 1
            scale = [1.0 if discount is None else discount**k for k in range(later)]
            advantage = sum(a * b for a, b in zip(scale, r[t + 1 :], strict=True))
            if length_norm and later:
                advantage /= sum(scale)
            rho = q[s, v] / mix[s, v]
            stopped = clip is not None and (
                (advantage > 0 and rho > 1 + clip) or (advantage < 0 and rho < 1 - clip)
            )
            if not stopped:
                grad[s] -= weight * advantage * rho * (np.eye(V)[v] - q[s])
    return grad


def exact(theta) -> np.ndarray:
    """d/dtheta of KL[q || p] between the distributions over answers."""
    with jax.enable_x64(True):

        def answer(z):
            log = token.log_prob_of(jnp.asarray(z)[ROWS], jnp.asarray(TOKENS))
            return reduce.keep(log, jnp.asarray(MASK)).sum(-1)

        def divergence(z):
            return jnp.sum(jnp.exp(answer(z)) * (answer(z) - answer(TEACHER)))

        return np.asarray(jax.jit(jax.grad(divergence))(jnp.asarray(theta)))


def plain(**changes) -> mini.Policy:
    return dataclasses.replace(mini.PRESETS["paper"], length_norm=False, cliprange=None, **changes)


def test_the_answers_are_all_there():
    assert len(ANSWERS) == 40
    np.testing.assert_allclose(chance(softmax(OLD)).sum(), 1, atol=1e-14)


@pytest.mark.parametrize("theta", [OLD, MOVED], ids=["first step", "later step"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_paper_has_the_papers_expectation(alpha, length_norm, clip, theta):
    policy = dataclasses.replace(mini.PRESETS["paper"], length_norm=length_norm, cliprange=clip)
    np.testing.assert_allclose(
        ours(policy, theta, alpha), papers(theta, alpha, length_norm, clip), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("discount", [0.5, 0.95])
def test_corrected_is_the_papers_with_a_weighted_mean_of_rewards(discount):
    policy = dataclasses.replace(
        mini.PRESETS["corrected"], gamma=discount, whiten="none", reward_clip=None
    )
    np.testing.assert_allclose(
        ours(policy, MOVED, 0.3), papers(MOVED, 0.3, True, 0.2, discount), atol=1e-10, rtol=0
    )


def test_student_samples_give_the_gradient_of_the_divergence():
    np.testing.assert_allclose(ours(plain(), OLD, 0.0), exact(OLD), atol=1e-10, rtol=0)


def test_prefix_weights_make_any_mixture_exact():
    for alpha in (0.2, 0.7):
        np.testing.assert_allclose(
            ours(plain(prefix_weights=True), OLD, alpha), exact(OLD), atol=1e-10, rtol=0
        )


def test_token_weights_are_an_approximation():
    """The paper's own: prefixes and later rewards stay the mixture's."""
    assert np.abs(ours(plain(), OLD, 0.2) - exact(OLD)).max() > 1e-3


@pytest.mark.parametrize("prefix", [False, True])
def test_weighing_the_single_step_term_with_the_own_token_changes_no_expectation(prefix):
    """E[w_t | y_<t] = 1, so for `prefix_weights`, where w_<t does matter, it must differ."""
    pair = [
        ours(plain(prefix_weights=prefix, weight_single_step=weighted), OLD, 0.3, ("single_step",))
        for weighted in (True, False)
    ]
    gap = np.abs(pair[0] - pair[1]).max()
    assert gap > 1e-3 if prefix else gap < 1e-12


def test_a_baseline_changes_no_expectation():
    center = ours(plain(whiten="center"), OLD, 0.0)
    np.testing.assert_allclose(center, exact(OLD), atol=1e-10, rtol=0)
