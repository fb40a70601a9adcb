"""MiniLLM on toys: what is collected and minimised, and what an update may not depend on."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.evaluation import divergence
from minillm_jax.methods import minillm
from minillm_jax.models import head, logits
from minillm_jax.objectives import policy as policy_lib
from minillm_jax.objectives import reduce, token
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.rollout import Mixing, Rollout, collect, response_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Sequences
from tests.toy_models import prompts, toy

ATOL = 1e-6
VOCAB, EOS = 7, 0
# Both heads have padding rows, and not the same number of them.
STUDENT, Q = toy(0, vocab=VOCAB + 2)
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)
MIXING = Mixing(slots=8, alpha=0.3, chunk=3, eos_id=EOS, pad_id=EOS, vocab=VOCAB)
PROMPTS = Sequences(*prompts(32, 5, VOCAB), response=np.zeros(0), response_mask=np.zeros(0))
# Without the single-step term the policy gradient has to do the work alone.
POLICIES = PRESETS | {"alone": dataclasses.replace(PRESETS["corrected"], single_step=False)}
# The trace without decay is the gradient itself, before the clip, in `opt_state[0]`. Plain
# descent: Adam would turn a rounding error in a gradient near 0 into a whole step.
SGD = optax.chain(optax.trace(0.0), optax.clip_by_global_norm(1.0), optax.sgd(0.1))
TRACES: list[str] = []


@functools.cache
def method(name, micro_batches=1):
    def rate(count):
        TRACES.append(name)
        return jnp.float32(0.1)

    models = STUDENT, TEACHER, SGD, rate
    options = {"policy": POLICIES[name], "mixing": MIXING, "micro_batches": micro_batches}
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


def sampled_reverse_kl(params):
    """Exact KL[q || p] per token on what the student alone writes."""
    mixing = dataclasses.replace(MIXING, alpha=0.0)
    prompt, mask = np.tile(PROMPTS.prompt, (8, 1)), np.tile(PROMPTS.prompt_mask, (8, 1))
    found = collect(STUDENT, TEACHER, params, P, prompt, mask, jax.random.key(9), mixing)
    rows = divergence.sums(STUDENT, TEACHER, params, P, Sequences.replace(found), VOCAB)
    return divergence.per_token(jax.device_get(rows), "reverse_kl")


@pytest.mark.parametrize("name", POLICIES)
def test_reverse_kl_falls_on_fresh_samples(name):
    made, state, teacher = method(name), start(Q), jax.tree.map(np.array, P)
    before, _ = sampled_reverse_kl(state.params)
    for round_ in range(20):
        found = made.collect(state.params, P, PROMPTS, jax.random.key(round_))
        for _ in range(2):
            state, metrics = made.update(state, P, found)
            assert metrics["skipped"] == 0
    after, error = sampled_reverse_kl(state.params)
    print(name, before, after, error)
    assert after < before - 5 * error
    jax.tree.map(np.testing.assert_array_equal, P, teacher)
    assert TRACES.count(name) == 1
