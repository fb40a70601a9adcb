"""Word-level KD on a toy: what is minimised, on what it may not depend, and what never exists."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.methods import divergence, sft
from minillm_jax.methods.on_policy import OnPolicy
from minillm_jax.objectives import reduce, token
from minillm_jax.train_state import TrainState
from minillm_jax.types import InputError
from tests.array_sizes import largest_with
from tests.methods.test_sft import batch, wider
from tests.toy_models import full_logits, toy

VOCAB = 7
STUDENT, Q = toy(0, vocab=VOCAB + 2)  # both heads have padding rows, and not as many
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)
# The trace without decay is the gradient itself.
SGD = optax.chain(optax.trace(0.0), optax.sgd(0.02))


def word_level(*args, vocab=VOCAB, **options):
    """KD as the registry has it: cross-entropy with the teacher, on given answers alone."""
    given = OnPolicy(0.0, 4, eos_id=0, pad_id=0, vocab=vocab)
    return divergence.method(*args, divergence="cross_entropy", on_policy=given, **options)


@functools.cache
def method(kd_ratio, micro_batches=1):
    models = STUDENT, TEACHER, SGD, lambda count: jnp.float32(0.02)
    return word_level(*models, kd_ratio=kd_ratio, micro_batches=micro_batches)


def start(params=Q):
    params = jax.tree.map(jnp.copy, params)
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zero[0], params, SGD.init(params), zero[1], zero[2])


def of_full_logits(params, kd_ratio):
    found = batch()

    q, p = (full_logits(m, found, VOCAB) for m in ((STUDENT, params), (TEACHER, P)))
    values = token.corpus(q, p, found.response, kd_ratio)
    return reduce.mean(reduce.total(values, found.response_mask))


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_the_full_logits(kd_ratio):
    want, grads = jax.jit(jax.value_and_grad(of_full_logits), static_argnums=1)(Q, kd_ratio)
    state, metrics = method(kd_ratio).update(start(), P, batch())
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    scale = float(optax.tree.norm(grads))
    np.testing.assert_allclose(metrics["grad_norm"], scale, rtol=1e-5)
    chex.assert_trees_all_close(state.opt_state[0].trace, grads, atol=1e-5 * scale)


def test_without_the_teacher_it_is_sft():
    rate = lambda count: jnp.float32(0.02)  # noqa: E731
    plain = sft.method(STUDENT, SGD, rate, vocab=VOCAB)
    state, metrics = plain.update(start(), None, batch())
    same, others = method(0.0).update(start(), P, batch())
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(others["loss"], others["nll"], rtol=1e-6)
    chex.assert_trees_all_close(same.params, state.params, atol=1e-7)


def test_the_student_comes_nearer_to_the_teacher():
    state, teacher, seen = start(), jax.tree.map(np.array, P), []
    for _ in range(20):
        state, metrics = method(1.0).update(state, P, batch())
        seen.append(float(metrics["forward_kl"]))
    assert seen[-1] < seen[0] / 2
    jax.tree.map(np.testing.assert_array_equal, P, teacher)


def test_neither_micro_batches_nor_padding_slots_change_anything():
    state, metrics = method(0.5).update(start(), P, batch())
    changed, others = method(0.5, 4).update(start(), P, wider(batch(), prompt=4, response=3))
    for key, value in metrics.items():
        np.testing.assert_allclose(others[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    chex.assert_trees_all_close(changed.params, state.params, atol=1e-6)


def test_no_logits_of_a_batch_exist():
    size, rows, slots = 97, 8, 80
    student, teacher = (dataclasses.replace(c, vocab_size=size) for c in (STUDENT, TEACHER))
    made = word_level(student, teacher, SGD, lambda count: 0.1, vocab=size, kd_ratio=0.5)
    q, p = toy(0, vocab=size)[1], toy(1, vocab=size, layers=1, width=24)[1]
    found = largest_with(size, made.update, start(q), p, batch(rows, slots))
    assert 0 < found < rows * slots * size


def test_a_share_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"kd_ratio=1.5: the teacher's share must be from 0 to 1"):
        method(1.5)
