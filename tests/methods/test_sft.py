"""Supervised fine-tuning of a toy: what is minimised, on which tokens, and what leaves no trace."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from minillm_jax.methods import sft
from minillm_jax.models import head, hidden_states, logits
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
        np.pad(found.prompt, left, constant_values=fill),
        np.pad(found.prompt_mask, left),
        np.pad(found.response, right, constant_values=fill),
        np.pad(found.response_mask, right),
    )


# Plain descent: Adam would turn a rounding error in a gradient near 0 into a whole step.
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
TRACES: list[int] = []


@functools.cache
def method(micro_batches=1):
    def rate(count):
        TRACES.append(micro_batches)
        return jnp.float32(0.01) * count

    return sft.method(CONFIG, SGD, rate, vocab=VOCAB, micro_batches=micro_batches)


def start(params=Q):
    params = jax.tree.map(jnp.copy, params)
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zero[0], params, SGD.init(params), zero[1], zero[2])


def test_loss_is_the_mean_over_tokens_of_the_true_vocabulary():
    found = batch()
    # Every row as prompt and response without a gap, padded at the end: another layout.
    rows = zip(*jax.tree.leaves(jax.device_get(found)), strict=True)
    rows = [(np.r_[a[a_mask], b[b_mask]], a_mask.sum()) for a, a_mask, b, b_mask in rows]
    tokens = np.stack([np.pad(row, (0, 11 - len(row))) for row, _ in rows])
    mask = np.arange(11)[None] < np.array([[len(row)] for row, _ in rows])
    hidden = jax.jit(hidden_states, static_argnums=0)(CONFIG, Q, tokens, mask)
    scores = np.asarray(logits(head(CONFIG, Q), hidden), np.float64)[..., :VOCAB]
    log_q = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    nll = [
        -log_q[i, t - 1, row[t]]
        for i, (row, first) in enumerate(rows)
        for t in range(first, len(row))
    ]
    _, metrics = method().update(start(), None, found)
    np.testing.assert_allclose(metrics["loss"], np.mean(nll), rtol=1e-5)


def test_loss_falls_with_one_trace():
    state, losses = start(), []
    for step in range(30):
        state, metrics = method().update(state, None, batch())
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(metrics["learning_rate"], 0.01 * step, rtol=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30 and int(state.skipped) == 0
    assert TRACES.count(1) == 1


def test_neither_micro_batches_nor_padding_slots_change_anything():
    state, metrics = method().update(start(), None, batch())
    other = wider(batch(), prompt=4, response=3)
    changed, others = method(micro_batches=4).update(start(), None, other)
    for key, value in metrics.items():
        np.testing.assert_allclose(others[key], value, rtol=1e-5, atol=ATOL, err_msg=key)
    chex.assert_trees_all_close(changed.params, state.params, atol=ATOL)


def test_ids_beyond_the_true_vocabulary_stay():
    state, _ = method().update(start(), None, batch())
    before, after = Q["head"]["weight"], state.params["head"]["weight"]
    np.testing.assert_array_equal(after[VOCAB:], before[VOCAB:])
    assert (after[:VOCAB] != before[:VOCAB]).any()


def test_nan_in_a_parameter_skips_the_update():
    bad = jax.tree.map(jnp.copy, Q)
    bad["embed"]["tokens"] = bad["embed"]["tokens"].at[1, 0].set(jnp.nan)
    state = start(bad)
    for count in (1, 2):
        state, metrics = method().update(state, None, batch())
        assert metrics["skipped"] == 1
        assert state.step == state.skipped == state.consecutive_skipped == count
    chex.assert_trees_all_equal(state.params, bad)
