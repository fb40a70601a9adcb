"""MiniLLM on plain text: the gradient of L_PT, its weight beside the policy, and who has to run."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.data.corpus import PADDING
from minillm_jax.methods import minillm
from minillm_jax.methods.corpus import CorpusLoss
from minillm_jax.models import head, hidden_states, logits
from minillm_jax.objectives import token
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.types import InputError
from tests.array_sizes import largest_with
from tests.methods.test_minillm import MIXING, SGD, STUDENT, TEACHER, VOCAB, P, Q, rollout, start
from tests.toy_models import toy

BLOCKS = jax.random.randint(jax.random.key(0), (8, 12), 0, VOCAB)


@functools.cache
def method(name, corpus=None, micro_batches=1) -> Any:
    models = STUDENT, TEACHER, SGD, lambda count: jnp.float32(0.1)
    options = {"policy": PRESETS[name], "mixing": MIXING, "micro_batches": micro_batches}
    return minillm.method(*models, **options, corpus=corpus)


def update(name, corpus, micro_batches=1, frozen=P, blocks=BLOCKS):
    batch = (rollout(), blocks) if corpus else rollout()
    state, metrics = method(name, corpus, micro_batches).update(start(Q), frozen, batch)
    return state.opt_state[0].trace, metrics  # the gradient before the clip


@functools.cache
def alone(name):
    return update(name, None)


def of_full_logits(params, kd_ratio):
    """L_PT as it is written: logits of every slot of both models, mean over all but the last."""

    def scores(config, params):
        hidden = hidden_states(config, params, BLOCKS, jnp.ones(BLOCKS.shape, bool))
        return logits(head(config, params), hidden)[:, :-1, :VOCAB]

    q, p = scores(STUDENT, params), scores(TEACHER, P)
    return token.corpus(q, p, BLOCKS[:, 1:], kd_ratio).mean()


# `paper` counts answers and `corrected` tokens: neither is the number of targets of the corpus.
@pytest.mark.parametrize(("name", "kd_ratio"), [("paper", 0.5), ("corrected", 0.0)])
def test_gradient_is_the_sum_of_two_means(name, kd_ratio):
    weight = 0.7
    want, grads = jax.jit(jax.value_and_grad(of_full_logits), static_argnums=1)(Q, kd_ratio)
    plain, before = alone(name)
    got, metrics = update(name, CorpusLoss(weight, kd_ratio))
    np.testing.assert_allclose(metrics["corpus_loss"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], before["loss"] + weight * want, rtol=1e-5)
    expected = jax.tree.map(lambda a, b: a + weight * b, plain, grads)
    scale = float(optax.tree.norm(expected))
    chex.assert_trees_all_close(got, expected, atol=1e-5 * scale)
    assert float(optax.tree.norm(grads)) * weight > 1e-3 * scale  # it weighs something
    for key in ("policy_loss", "single_step_loss", "reverse_kl", "reward", "ess"):
        np.testing.assert_allclose(metrics[key], before[key], rtol=1e-6, err_msg=key)


def test_micro_batches_change_nothing():
    """With as many blocks in each, but not as many tokens of answers."""
    corpus = CorpusLoss(0.7, 0.5)
    (want, metrics), (got, others) = (update("corrected", corpus, count) for count in (1, 4))
    for key, value in metrics.items():
        np.testing.assert_allclose(others[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    chex.assert_trees_all_close(got, want, atol=1e-6 * float(metrics["grad_norm"]))


def test_padding_of_blocks_is_no_target():
    """Rows of unlike lengths: the mean over their targets, whatever micro-batch they fall into."""
    lengths = 2 + jnp.arange(len(BLOCKS))
    real = jnp.arange(BLOCKS.shape[1])[None] < lengths[:, None]
    padded = jnp.where(real, BLOCKS, PADDING)
    loss = CorpusLoss()

    def mean(params):
        hidden = hidden_states(STUDENT, params, BLOCKS, real)
        scores = logits(head(STUDENT, params), hidden)[:, :-1, :VOCAB]
        return jnp.mean(token.corpus(scores, scores, BLOCKS[:, 1:], 0.0), where=real[:, 1:])

    want, grads = jax.value_and_grad(mean)(Q)
    for micro_batches in (1, 4):
        found, metrics = update("corrected", loss, micro_batches, blocks=padded)
        np.testing.assert_allclose(metrics["corpus_loss"], want, rtol=1e-5)
        expected = jax.tree.map(jnp.add, alone("corrected")[0], grads)
        chex.assert_trees_all_close(found, expected, atol=1e-5 * float(optax.tree.norm(expected)))


def test_no_weight_is_off():
    (want, metrics), (got, others) = alone("corrected"), update("corrected", CorpusLoss(0.0, 0.5))
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-6)
    chex.assert_trees_all_close(got, want, atol=1e-6 * float(metrics["grad_norm"]))


def test_the_teacher_reads_the_corpus_only_for_its_share():
    """A trunk that gives NaN is noticed where it runs; the rollout has its own teacher states."""
    broken = P | {"layers": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), P["layers"])}
    for kd_ratio, skipped in ((0.0, 0), (0.5, 1)):
        _, metrics = update("corrected", CorpusLoss(0.7, kd_ratio), frozen=broken)
        assert metrics["skipped"] == skipped


def test_no_logits_of_a_corpus_batch_exist():
    size, blocks = 97, np.ones((16, 80), np.int32)
    student, teacher = (dataclasses.replace(c, vocab_size=size) for c in (STUDENT, TEACHER))
    mixing = dataclasses.replace(MIXING, vocab=size)
    made: Any = minillm.method(
        student,
        teacher,
        SGD,
        lambda count: 0.1,
        policy=PRESETS["corrected"],
        mixing=mixing,
        corpus=CorpusLoss(1.0, 0.5),
    )
    q, p = toy(0, vocab=size)[1], toy(1, vocab=size, layers=1, width=24)[1]
    found = largest_with(size, made.update, start(q), p, (rollout(), blocks))
    assert 0 < found < blocks.size * size / 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1.0, 0.0), "coefficient=-1.0: it must be 0 or more"),
        ((float("nan"), 0.0), "coefficient=nan"),
        ((1.0, 1.5), "kd_ratio=1.5: the teacher's share must be from 0 to 1"),
    ],
)
def test_what_weighs_no_loss_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        CorpusLoss(*values)
