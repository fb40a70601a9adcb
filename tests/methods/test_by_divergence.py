"""Distillation by a divergence: its gradient, whose answers are read, replay, and TAID's t."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.methods import divergence
from minillm_jax.methods.on_policy import OnPolicy, Replay
from minillm_jax.objectives import reduce, token, top_k
from minillm_jax.objectives.taid import Schedule
from minillm_jax.objectives.top_k import Cut
from minillm_jax.sharding import make_mesh, replicated
from minillm_jax.train_state import TrainState
from minillm_jax.types import InputError
from tests.methods.test_sft import batch
from tests.toy_models import full_logits, toy

VOCAB = 7
STUDENT, Q = toy(0, vocab=VOCAB + 2, layers=1)  # both heads have padding rows, and not as many
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)
# The trace without decay is the gradient itself.
SGD = optax.chain(optax.trace(0.0), optax.sgd(0.02))
SLOTS = 4


def who_writes(share, replay=None):
    return OnPolicy(share, SLOTS, eos_id=0, pad_id=0, vocab=VOCAB, replay=replay)


@functools.cache
def method(name, share=0.0, replay=None, taid=None, **options) -> Any:
    on_policy = who_writes(share, replay)
    memory = divergence.remembered(on_policy, taid, 5, 6)
    return divergence.method(
        STUDENT, TEACHER, SGD, lambda count: jnp.float32(0.02), divergence=name,
        on_policy=on_policy, taid=taid, memory=memory, seed=3, **options,
    )  # fmt: skip


def start(method, step=0) -> Any:
    params = jax.tree.map(jnp.copy, Q)
    one, two = (jnp.zeros((), jnp.int32) for _ in range(2))
    whole = replicated(make_mesh(devices=jax.devices()[:1]))
    memory = jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), whole), method.memory)
    return TrainState(jnp.int32(step), params, SGD.init(params), one, two, memory)


def key_of(step):
    """Of an update of the methods here."""
    return jax.random.fold_in(jax.random.key(3), step)


def reader(on_policy) -> Any:
    """What an update with this key would read."""
    return jax.jit(lambda *rest: on_policy.source(STUDENT, *rest[:2], batch(), *rest[2:]))


def of_full_logits(params, rows):
    q, p = (full_logits(m, rows, VOCAB) for m in ((STUDENT, params), (TEACHER, P)))
    values = 0.6 * token.jsd(q, p, 0.3) + 0.4 * token.cross_entropy(q, rows.response)
    return reduce.mean(reduce.total(values, rows.response_mask))


def jsd(share=0.0) -> Any:
    return method("jsd", share, parameter=0.3, kd_ratio=0.6, micro_batches=2)


def test_gradient_is_that_of_the_full_logits():
    """On given answers, cut in two."""
    want, grads = jax.jit(jax.value_and_grad(of_full_logits))(Q, batch())
    state, metrics = jsd().update(start(jsd()), P, batch())
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    scale = float(optax.tree.norm(grads))
    chex.assert_trees_all_close(state.opt_state[0].trace, grads, atol=1e-5 * scale)
    assert state.memory == () and "on_policy" not in metrics


def test_a_teacher_cut_to_its_likeliest_ids_comes_with_the_batch():
    """With all of them the update is that of the teacher itself, and no teacher is asked."""
    z_p = jax.jit(lambda rows: full_logits((TEACHER, P), rows, VOCAB))(batch())
    given = {name: getattr(batch(), name) for name in batch().__dataclass_fields__}
    want, metrics = jsd().update(start(jsd()), P, batch())
    for k in (VOCAB, 2):
        ids, log_p = top_k.likeliest(z_p, k)
        got, found = jsd().update(start(jsd()), None, Cut(**given, ids=ids, log_p=log_p))
        if k == VOCAB:
            np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
            np.testing.assert_allclose(found["divergence"], metrics["divergence"], rtol=1e-5)
            chex.assert_trees_all_close(got.params, want.params, atol=1e-6)
        else:
            z_q = top_k.cut(full_logits((STUDENT, Q), batch(), VOCAB), ids)
            apart = reduce.mean(reduce.total(token.jsd(z_q, log_p, 0.3), batch().response_mask))
            np.testing.assert_allclose(found["divergence"], apart, rtol=1e-5)
            assert found["divergence"] < metrics["divergence"]


def test_the_student_writes_as_often_as_lambda_says_and_is_then_what_is_read():
    read = reader(who_writes(0.3))
    drawn = [int(read(Q, None, key_of(step), jnp.int32(step))[2]) for step in range(200)]
    assert abs(np.mean(drawn) - 0.3) < 0.1 and set(drawn) == {0, 1}
    for who in (0, 1):
        step = drawn.index(who)
        rows = read(Q, None, key_of(step), jnp.int32(step))[0]
        assert rows.response.shape == batch().response.shape
        assert bool((rows.response == batch().response).all()) == (who == 0)
        assert who == 0 or not rows.response_mask[:, SLOTS:].any()
        got, metrics = jsd(0.3).update(start(jsd(0.3), step), P, batch())
        want, others = jsd().update(start(jsd()), P, rows)
        np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
        # No gradient goes through the sampling.
        chex.assert_trees_all_close(got.params, want.params, atol=1e-6)
        assert metrics["on_policy"] == who
        assert metrics["tokens"] == rows.prompt_mask.sum() + rows.response_mask.sum()


def test_distillm_fills_its_buffer_and_draws_from_it_while_taid_moves_its_teacher():
    """phi = 1 of 10 updates: all write until 20 rows are kept, then ever fewer. TAID's t moves."""
    replay, schedule = Replay(capacity=20, steps=10), Schedule(steps=10, start=0.4)
    made = method("interpolated_kl", 1.0, replay, schedule)
    state, seen, writers, read = start(made), [], [], reader(who_writes(1.0, replay))
    advance, progress = jax.jit(schedule.advance), schedule.begin()
    for step in range(10):
        before = jax.tree.map(np.array, state.memory["replay"])
        rows, after, who = read(state.params, before, key_of(step), jnp.int32(step))
        state, metrics = made.update(state, P, batch())
        kept = state.memory["replay"]
        chex.assert_trees_all_equal(kept, after)
        writers.append(int(who))
        coin = float(jax.random.uniform(jax.random.split(key_of(step))[0]))
        full = before.written >= 20
        assert int(who) == (1 if coin < 1 - (step + 1) / 10 or not full else 2)
        if who == 1:
            seen += [row.tolist() for row in np.asarray(rows.response)]
            where = (int(before.written) + np.arange(8)) % 20
            np.testing.assert_array_equal(kept.rows.response[where], rows.response)
        else:
            assert all(row.tolist() in seen for row in np.asarray(rows.response))
            np.testing.assert_array_equal(kept.written, before.written)
        assert metrics["on_policy"] == 1.0 and metrics["threshold"] == 1.0
        assert float(metrics["t"]) == float(progress.t)
        progress = advance(progress, metrics["divergence"], jnp.int32(step))
        chex.assert_trees_all_close(state.memory["taid"], progress, rtol=1e-6)
    assert float(progress.t) > 0.9
    assert set(writers) == {1, 2} and writers[:3] == [1, 1, 1]


def test_a_loss_that_rises_raises_the_threshold():
    """The first loss is where the comparison starts; then only a rise of 0.1 or more counts."""
    made = method("skew_forward_kl", 0.0, Replay(capacity=20, steps=10))
    state = start(made)
    phis = []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.15, 2.5, 1.0, 2.55, 2.7):
        state = made.observe(state, {"loss": loss})
        phis.append(round(float(state.memory["replay"].threshold), 3))
    assert phis == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3]
    for loss in range(3, 20):
        state = made.observe(state, {"loss": float(loss)})
    assert float(state.memory["replay"].threshold) == 1.0


def test_a_share_that_is_none_is_refused():
    with pytest.raises(InputError, match="on_policy=1.5: the student's share is from 0 to 1"):
        who_writes(1.5)
