"""MiniLLM on toys: what is collected and minimised, and what an update may not depend on."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.methods import minillm
from minillm_jax.models import abstract_params, head, logits
from minillm_jax.objectives import policy as policy_lib
from minillm_jax.objectives import reduce, token
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.rollout import Mixing, Rollout, collect, response_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Sequences
from tests.array_sizes import shapes
from tests.toy_models import prompts, toy

ATOL = 1e-6
VOCAB, EOS = 7, 0
# Both heads have padding rows, and not the same number of them.
STUDENT, Q = toy(0, vocab=VOCAB + 2)
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)
MIXING = Mixing(slots=8, alpha=0.3, chunk=3, eos_id=EOS, pad_id=EOS, vocab=VOCAB)
PROMPTS = Sequences(*prompts(32, 5, VOCAB), response=np.zeros(0), response_mask=np.zeros(0))
# The trace without decay is the gradient itself, before the clip, in `opt_state[0]`. Plain
# descent: Adam would turn a rounding error in a gradient near 0 into a whole step.
SGD = optax.chain(optax.trace(0.0), optax.clip_by_global_norm(1.0), optax.sgd(0.1))
TRACES: list[str] = []


@functools.cache
def method(name, micro_batches=1) -> Any:  # a Method that has `collect`
    def rate(count):
        TRACES.append(name)
        return jnp.float32(0.1)

    models = STUDENT, TEACHER, SGD, rate
    options = {"policy": PRESETS[name], "mixing": MIXING, "micro_batches": micro_batches}
    return minillm.method(*models, **options)


@functools.cache
def rollout():
    return method("corrected").collect(Q, P, PROMPTS, jax.random.key(0))


@functools.cache
def moved():
    """A student some way from the one that wrote `rollout`, so that the ratios are not 1."""
    return jax.tree.map(lambda x: x * 1.05, Q)


def start(params):
    params = jax.tree.map(jnp.copy, params)
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return TrainState(zero[0], params, SGD.init(params), zero[1], zero[2])


def sampled_reverse_kl(name, params):
    """Exact KL[q || p] per token on what the student alone writes, as the update measures it."""
    mixing = dataclasses.replace(MIXING, alpha=0.0)
    given, key = (PROMPTS.prompt, PROMPTS.prompt_mask), jax.random.key(99)
    found = collect(STUDENT, TEACHER, params, P, *given, key, mixing)
    return float(method(name).update(start(params), P, found)[1]["reverse_kl"])


def test_a_collection_in_slices_is_each_slice_in_its_place():
    options = {"policy": PRESETS["corrected"], "mixing": MIXING}
    sliced: Any = minillm.method(STUDENT, TEACHER, SGD, lambda _: 0.1, **options, collect_batch=8)
    key = jax.random.key(0)
    found = sliced.collect(Q, P, PROMPTS, key)
    for part, its_key in enumerate(jax.random.split(key, 4)):
        rows = slice(8 * part, 8 * part + 8)
        given = PROMPTS.prompt[rows], PROMPTS.prompt_mask[rows]
        alone = collect(STUDENT, TEACHER, Q, P, *given, its_key, MIXING)
        jax.tree.map(lambda x, y, r=rows: np.testing.assert_array_equal(x[r], y), found, alone)
    assert not np.array_equal(found.response[:8], found.response[8:16])
    whole: Any = minillm.method(STUDENT, TEACHER, SGD, lambda _: 0.1, **options, collect_batch=32)
    jax.tree.map(np.testing.assert_array_equal, whole.collect(Q, P, PROMPTS, key), rollout())


@pytest.mark.parametrize("name", PRESETS)
def test_reverse_kl_falls_on_fresh_samples(name):
    made, state, teacher = method(name), start(Q), jax.tree.map(np.array, P)
    before = sampled_reverse_kl(name, state.params)
    for round_ in range(12):
        found = made.collect(state.params, P, PROMPTS, jax.random.key(round_))
        for _ in range(2):
            state, metrics = made.update(state, P, found)
            assert metrics["skipped"] == 0
    assert sampled_reverse_kl(name, state.params) < before / 4
    jax.tree.map(np.testing.assert_array_equal, P, teacher)
    assert TRACES.count(name) == 1


@functools.cache
def expected():
    """Losses, their KL and gradients by preset, from the full logits of both models, read again."""
    found = rollout()

    def scores(config, params):
        hidden = response_states(config, params, found)
        return logits(head(config, params), hidden)[..., :VOCAB]

    @jax.jit
    def make(params):
        mask, p = found.response_mask, scores(TEACHER, P)
        log_p = token.log_prob_of(p, found.response)
        log_q_old = token.log_prob_of(scores(STUDENT, Q), found.response)
        log_mix = policy_lib.log_mixture(log_q_old, log_p, MIXING.alpha)

        def loss(q, policy):
            targets = policy_lib.prepare(policy, log_p, log_q_old, log_mix, mask)
            log_q, kl = token.log_prob_of(q, found.response), token.reverse_kl(q, p)
            values = policy_lib.losses(policy, log_q, kl, targets, mask)["loss"]
            return reduce.mean(reduce.total(values, mask, policy.reduction))

        q, pull = jax.vjp(lambda params: scores(STUDENT, params), params)
        values = [jax.value_and_grad(loss)(q, policy) for policy in PRESETS.values()]
        (grads,) = jax.vmap(pull)(jnp.stack([grad for _, grad in values]))
        kl = reduce.mean(reduce.total(token.reverse_kl(q, p), mask))
        return [value for value, _ in values], grads, kl

    losses, grads, kl = make(moved())
    return {
        name: (losses[i], jax.tree.map(lambda g, i=i: g[i], grads), kl)
        for i, name in enumerate(PRESETS)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_update_descends_the_loss_of_the_full_logits(name):
    state, metrics = method(name).update(start(moved()), P, rollout())
    loss, grads, kl = expected()[name]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["reverse_kl"], kl, rtol=1e-5)
    scale = optax.tree.norm(grads)
    np.testing.assert_allclose(metrics["grad_norm"], scale, rtol=1e-5)
    chex.assert_trees_all_close(state.opt_state[0].trace, grads, atol=1e-5 * float(scale))


def wider(found, prompt, response, fill):
    """`found` with more padding slots: another id than before, and `fill` where floats are."""

    def pad(name, x) -> Any:
        slots = (prompt, 0) if name.startswith("prompt") else (0, response)
        value = fill if x.dtype == jnp.float32 else 0 if x.dtype == bool else 3
        width = ((0, 0), slots, (0, 0))[: x.ndim]
        return np.pad(x, width, constant_values=value)

    return Rollout(
        **{f.name: pad(f.name, getattr(found, f.name)) for f in dataclasses.fields(found)}
    )


def test_neither_micro_batches_nor_padding_slots_change_anything():
    state, metrics = method("corrected").update(start(moved()), P, rollout())
    other = wider(rollout(), prompt=4, response=3, fill=np.nan)
    changed, others = method("corrected", micro_batches=4).update(start(moved()), P, other)
    for key, value in metrics.items():
        rtol = 1e-6 if key == "loss" else 1e-5
        np.testing.assert_allclose(others[key], value, rtol=rtol, atol=ATOL, err_msg=key)
    chex.assert_trees_all_close(changed.params, state.params, atol=ATOL)
    scale = float(metrics["grad_norm"])
    grads = (changed.opt_state[0].trace, state.opt_state[0].trace)
    chex.assert_trees_all_close(*grads, atol=ATOL * scale)


@pytest.mark.parametrize("place", ["log_p", "teacher_hidden", "parameter"])
def test_what_is_not_finite_is_skipped(place):
    params, found = jax.tree.map(jnp.copy, Q), rollout()
    if place == "parameter":
        params["embed"]["tokens"] = params["embed"]["tokens"].at[1, 0].set(jnp.nan)
    else:
        bad, row = getattr(found, place), found.response_mask.sum(axis=1).argmax()
        # Not at the first token: its reward belongs to no return of `corrected`.
        found = found.replace(**{place: bad.at[row, 1].set(jnp.nan)})
    state = start(params)
    for count in (1, 2):
        state, metrics = method("corrected").update(state, P, found)
        assert metrics["skipped"] == 1
        assert state.step == state.skipped == state.consecutive_skipped == count
    chex.assert_trees_all_equal(state.params, params)
    assert not any(x.any() for x in jax.tree.leaves(state.opt_state[0]))


def test_no_scores_of_a_batch_over_the_vocabulary_exist():
    """Only heads and embeddings have a vocabulary axis at the boundary; inside, no [B, N, V]."""
    vocab, rows, slots = 97, 8, 80
    student, teacher = (dataclasses.replace(c, vocab_size=vocab) for c in (STUDENT, TEACHER))
    q, p = abstract_params(student), abstract_params(teacher)
    mixing = dataclasses.replace(MIXING, vocab=vocab, slots=slots)
    made: Any = minillm.method(
        student, teacher, SGD, lambda count: 0.1, policy=PRESETS["corrected"], mixing=mixing
    )
    given = Sequences(
        np.ones((rows, 5), np.int32), np.ones((rows, 5), bool), np.zeros(0), np.zeros(0)
    )
    found = jax.eval_shape(made.collect, q, p, given, jax.random.key(0))
    state = jax.eval_shape(start, q)
    out, metrics = jax.eval_shape(made.update, state, p, found)
    boundary = jax.tree_util.tree_leaves_with_path((state, p, found, out, metrics))
    with_vocab = {jax.tree_util.keystr(path[-2:]) for path, x in boundary if vocab in x.shape}
    assert with_vocab == {"['embed']['tokens']", "['head']['weight']"}
    assert all(x.shape[0] == vocab for _, x in boundary if vocab in x.shape)
    inside = list(shapes(jax.make_jaxpr(made.update)(state, p, found).jaxpr))
    over_vocab = [np.prod(shape) / vocab for shape in inside if vocab in shape]
    assert len(over_vocab) > 20  # the walk gets to the blocks
    assert max(over_vocab) < rows * slots
