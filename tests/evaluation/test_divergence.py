"""Exact divergences of given responses, and the standard error of their means over tokens."""

import jax
import numpy as np

from minillm_jax.evaluation import divergence
from minillm_jax.objectives import token
from minillm_jax.types import Sequences
from tests.toy_models import full_logits, prompts, toy

VOCAB = 7
STUDENT, Q = toy(0, vocab=VOCAB + 2)
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)


def batch(rows=6, slots=8):
    prompt, prompt_mask = prompts(rows, 5, VOCAB)
    rng = np.random.default_rng(0)
    lengths = np.array([[8], [1], [5], [3], [0], [6]])
    mask = np.arange(slots)[None] < lengths
    response = np.where(mask, rng.integers(0, VOCAB, (rows, slots)), 0).astype(np.int32)
    return Sequences(prompt, prompt_mask, response, mask)


@jax.jit
def full(found):
    """The same values per token [B, N], from the full logits."""
    q, p = (full_logits(model, found, VOCAB) for model in ((STUDENT, Q), (TEACHER, P)))
    return {
        "reverse_kl": token.reverse_kl(q, p),
        "forward_kl": token.forward_kl(q, p),
        "log_q": token.log_prob_of(q, found.response),
        "log_p": token.log_prob_of(p, found.response),
        "entropy": token.entropy(q),
    }


def test_sums_are_those_of_the_full_logits():
    found = batch()
    rows = divergence.sums(STUDENT, TEACHER, Q, P, found, VOCAB)
    assert set(rows) == {*divergence.KEYS, *divergence.TOKEN_KEYS, "tokens"}
    np.testing.assert_array_equal(rows["tokens"], [8, 1, 5, 3, 0, 6])
    for name, values in jax.device_get(full(found)).items():
        by_hand = [v[m].sum() for v, m in zip(values, found.response_mask, strict=True)]
        np.testing.assert_allclose(rows[name], by_hand, rtol=1e-5, atol=1e-5, err_msg=name)
    values = jax.device_get(full(found))
    ratio = np.where(found.response_mask, values["log_p"] - values["log_q"], 0)
    np.testing.assert_allclose(rows["log_ratio"], ratio, rtol=1e-5, atol=1e-5)
    apart = np.where(found.response_mask, values["forward_kl"], 0)
    np.testing.assert_allclose(rows["forward_kl_at"], apart, rtol=1e-5, atol=1e-5)
    nll = divergence.answer_nll(STUDENT, Q, found, VOCAB)
    np.testing.assert_allclose(nll, -rows["log_q"], rtol=1e-5, atol=1e-5)


def test_error_of_a_hand_value():
    # Mean 12 / 6 = 2, residuals -1, 1, 0; sqrt(2 / 2 / 3) / (6 / 3).
    rows = {"kl": np.array([1.0, 5.0, 6.0]), "tokens": np.array([1, 2, 3])}
    assert divergence.per_token(rows, "kl") == (2.0, np.sqrt(1 / 3) / 2)
    assert divergence.per_token({"kl": np.array([3.0]), "tokens": np.array([2])}, "kl") == (
        1.5,
        0.0,
    )
    assert divergence.per_token({"kl": np.zeros(2), "tokens": np.zeros(2)}, "kl") == (0.0, 0.0)


def test_error_is_that_of_the_bootstrap_over_responses():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, 400)
    # A level of each response's own: an error from independent tokens would be far too small.
    value = tokens * rng.gamma(2.0, 0.5, 400) + rng.normal(size=400)
    mean, error = divergence.per_token({"kl": value, "tokens": tokens}, "kl")
    draws = rng.integers(0, 400, (4000, 400))
    ratios = value[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    # The bootstrap's own error at 4,000 draws is 1 %.
    np.testing.assert_allclose(error, ratios.std(), rtol=0.05)
    assert abs(mean - ratios.mean()) < 0.1 * error


def test_stacked_batches_are_one():
    first = {"kl": np.array([1.0, 5.0]), "tokens": np.array([1, 2])}
    second = {"kl": np.array([6.0]), "tokens": np.array([3])}
    whole = divergence.stack([first, second])
    assert divergence.per_token(whole, "kl") == (2.0, np.sqrt(1 / 3) / 2)
