"""Supervised fine-tuning of a toy: what is minimised, on which tokens, and what leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.methods import sft
from minillm_jax.models import head, hidden_states, logits
from minillm_jax.optim import adamw
from minillm_jax.train_state import TrainState
from minillm_jax.types import Sequences
from tests.toy_models import prompts, toy

ATOL = 1e-6
VOCAB = 7
CONFIG, Q = toy(0, vocab=VOCAB + 2)  # two rows of the head are padding


def batch(rows=8, slots=6):
    prompt, prompt_mask = prompts(rows, 5, VOCAB)
    rng = np.random.default_rng(0)
    mask = np.arange(slots)[None] < rng.integers(1, slots + 1, (rows, 1))
    response = np.where(mask, rng.integers(0, VOCAB, (rows, slots)), 0).astype(np.int32)
    return Sequences(prompt, prompt_mask, jnp.asarray(response), jnp.asarray(mask))


def wider(found, prompt, response, fill=3):
    """`found` with more padding slots, holding another id than the padding of before."""
    left, right = ((0, 0), (prompt, 0)), ((0, 0), (0, response))
    return Sequences(
        jnp.pad(found.prompt, left, constant_values=fill),
        jnp.pad(found.prompt_mask, left),
        jnp.pad(found.response, right, constant_values=fill),
        jnp.pad(found.response_mask, right),
    )


def start(optimizer, params=Q):
    params = jax.tree.map(jnp.copy, params)
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zero[0], params, optimizer.init(params), zero[1], zero[2])


# Plain descent: Adam would turn a rounding error in a gradient near 0 into a whole step.
SGD = optax.sgd(0.1)


def method(optimizer=SGD, rate=lambda count: 0.1, **options):
    return sft.method(CONFIG, optimizer, rate, vocab=VOCAB, **options)


ONE = method()


def updated(found, made=ONE):
    return made.update(start(SGD), None, found)


def assert_same(first, second):
    for (one, metrics), (two, others) in [(first, second)]:
        np.testing.assert_allclose(metrics["loss"], others["loss"], atol=ATOL)
        np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), one.params, two.params
        )


def test_loss_is_the_mean_over_tokens_of_the_true_vocabulary():
    found = batch()
    total, count = 0.0, 0
    for prompt, prompt_mask, response, mask in zip(
        found.prompt, found.prompt_mask, found.response, found.response_mask, strict=True
    ):
        # One row at a time and without padding: an independent reading of the layout.
        tokens = jnp.concatenate([prompt, response])[None, 5 - prompt_mask.sum() : 5 + mask.sum()]
        hidden = hidden_states(CONFIG, Q, tokens, jnp.ones_like(tokens, bool))[0]
        scores = np.asarray(logits(head(CONFIG, Q), hidden), np.float64)[:, :VOCAB]
        log_q = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        for t, label in enumerate(np.asarray(response[: mask.sum()])):
            total, count = total - log_q[prompt_mask.sum() - 1 + t, label], count + 1
    _, metrics = updated(found)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)


def test_loss_falls_with_one_trace():
    traces = []

    def rate(count):
        traces.append(count)
        return jnp.float32(0.01) * count

    optimizer = adamw(0.01)
    made, state, losses = method(optimizer, rate), start(optimizer), []
    for step in range(30):
        state, metrics = made.update(state, None, batch())
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(metrics["learning_rate"], 0.01 * step, rtol=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30 and int(state.skipped) == 0
    assert len(traces) == 1


def test_four_micro_batches_are_one():
    assert_same(updated(batch(), method(micro_batches=4)), updated(batch()))


@pytest.mark.parametrize(("prompt", "response"), [(4, 3)])
def test_padding_slots_change_nothing(prompt, response):
    assert_same(updated(wider(batch(), prompt, response)), updated(batch()))


def test_ids_beyond_the_true_vocabulary_stay():
    state, _ = updated(batch())
    before, after = Q["head"]["weight"], state.params["head"]["weight"]
    np.testing.assert_array_equal(after[VOCAB:], before[VOCAB:])
    assert (after[:VOCAB] != before[:VOCAB]).any()


def test_nan_in_a_parameter_skips_the_update():
    bad = jax.tree.map(jnp.copy, Q)
    bad["embed"]["tokens"] = bad["embed"]["tokens"].at[1, 0].set(jnp.nan)
    state = start(SGD, bad)
    for count in (1, 2):
        state, metrics = ONE.update(state, None, batch())
        assert metrics["skipped"] == 1
        assert state.step == state.skipped == state.consecutive_skipped == count
    jax.tree.map(np.testing.assert_array_equal, state.params, bad)
