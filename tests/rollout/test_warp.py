import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.rollout.warp import NEVER, Warp, choose, draw, warped


@pytest.mark.parametrize("vocab", [1, 3, 10, 97])
def test_draw_inverts_the_cdf(vocab):
    """A grid of uniforms meets every id as often as its probability says, to one grid step."""
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 2
    grid = (jnp.arange(20_000) + 0.5) / 20_000
    found = draw(jnp.broadcast_to(logits, (grid.size, vocab)), grid)
    counts = np.bincount(np.asarray(found), minlength=vocab) / grid.size
    np.testing.assert_allclose(counts, jax.nn.softmax(logits), atol=2e-4)


def test_draw_never_returns_an_excluded_id():
    logits = jnp.full((64, 50), NEVER).at[:, jnp.array([3, 49])].set(jnp.array([[0.0, 1.0]]))
    uniform = jnp.concatenate([jnp.linspace(0, 1, 62), jnp.array([0.0, 1 - 2**-24])])
    assert set(np.asarray(draw(logits, uniform)).tolist()) == {3, 49}


def test_draw_at_the_ends_of_the_unit_interval():
    logits = jnp.array([[NEVER, 0.0, NEVER, 2.0, NEVER]] * 2)
    assert draw(logits, jnp.array([0.0, 1 - 2**-24])).tolist() == [1, 3]


def naive(warp: Warp, logits: np.ndarray, history: list[int]) -> np.ndarray:
    """Probabilities after the warps, by the book, one row."""
    logits = logits.astype(np.float64).copy()
    n = warp.no_repeat_ngram
    if n:
        seen = {tuple(history[i : i + n]) for i in range(len(history) - n + 1)}
        for v in range(len(logits)):
            if tuple(history[len(history) - n + 1 :] + [v]) in seen:
                logits[v] = -np.inf
    logits /= warp.temperature
    if warp.top_k:
        logits[logits < np.sort(logits)[-warp.top_k]] = -np.inf
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    if warp.top_p < 1:
        order = np.argsort(-probs)
        size = int(np.sum(np.cumsum(probs[order]) - probs[order] < warp.top_p))
        kept = np.zeros_like(probs)
        kept[order[:size]] = probs[order[:size]]
        probs = kept / kept.sum()
    return probs


CASES = list(itertools.product([1.0, 0.5], [0, 3], [1.0, 0.6], [0, 1, 2, 3]))


@pytest.mark.parametrize("temperature, top_k, top_p, ngram", CASES)
def test_warped_equals_the_textbook(temperature, top_k, top_p, ngram):
    warp = Warp(temperature, top_k, top_p, ngram)
    history = jnp.array([[1, 2, 3, 1, 2, 0, 0], [4, 4, 4, 4, 4, 0, 0]])  # 5 ids are real
    logits = jax.random.normal(jax.random.key(3), (2, 6)) * 2
    probs = jax.nn.softmax(warped(warp, logits, history, jnp.int32(5)), axis=-1)
    for row in range(2):
        expected = naive(warp, np.asarray(logits[row]), history[row, :5].tolist())
        np.testing.assert_allclose(probs[row], expected, atol=1e-6)


def test_a_ban_of_single_ids_is_not_at_padding():
    history = jnp.array([[-1, -2, -3, 4, 1, 0]])  # three slots of left padding, and one to come
    probs = jax.nn.softmax(
        warped(Warp(no_repeat_ngram=1), jnp.zeros((1, 6)), history, jnp.int32(5))
    )
    assert jnp.flatnonzero(probs[0]).tolist() == [0, 2, 3, 5]


def test_greedy_takes_the_best():
    # a clear best, the first of two, and rows that no comparison of numbers decides
    logits = jnp.array([[0.0, 2.0, 1.0], [1.0, 3.0, 3.0], [-jnp.inf] * 3, [jnp.nan] * 3])
    found = choose(Warp(temperature=0.0), logits, jnp.full((4,), 0.999))
    assert found[:3].tolist() == jnp.argmax(logits[:3], axis=-1).tolist() == [1, 1, 0]
    assert 0 <= found[3] < 3
