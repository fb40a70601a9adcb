"""Dropout in SFT and KD: off without a seed, and otherwise a function of seed, step and place."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minillm_jax.methods import divergence, sft
from minillm_jax.methods.accumulate import dropout_keys
from minillm_jax.methods.on_policy import OnPolicy
from minillm_jax.train_state import TrainState
from tests.methods.test_sft import batch
from tests.toy_models import toy

VOCAB = 7
CONFIG, Q = toy(0, vocab=VOCAB)
SGD = optax.sgd(0.1)
NAMES = ("sft", "kd")


@functools.cache
def method(name, rate=0.2, seed: int | None = 3, micro_batches=1):
    config = dataclasses.replace(CONFIG, dropout=rate)
    options = {"vocab": VOCAB, "dropout_seed": seed, "micro_batches": micro_batches}
    if name == "sft":
        return sft.method(config, SGD, lambda count: 0.1, **options)
    given = OnPolicy(0.0, 4, eos_id=0, pad_id=0, vocab=options.pop("vocab"))
    options |= {"divergence": "cross_entropy", "on_policy": given, "kd_ratio": 0.5}
    return divergence.method(config, CONFIG, SGD, lambda count: 0.1, **options)


def loss(step, *args, given=None, **options):
    """The loss that update `step` sees, always with the same parameters."""
    params = jax.tree.map(jnp.copy, Q)
    zero = [jnp.zeros((), jnp.int32) for _ in range(2)]
    state = TrainState(jnp.int32(step), params, SGD.init(params), *zero)
    update = method(*args, **options).update
    return float(update(state, Q, given or batch())[1]["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_and_no_rate_are_off(name):
    off = loss(0, name, seed=None)
    assert off == loss(5, name, seed=None)
    np.testing.assert_allclose(loss(0, name, rate=0.0), off, rtol=1e-6)
    assert abs(loss(0, name) - off) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_step_repeats_itself_and_no_other(name):
    first = loss(4, name)
    assert loss(4, name) == first
    assert len({first, loss(5, name), loss(4, name, seed=8)}) == 3


def test_every_micro_batch_has_a_key_of_its_own():
    assert dropout_keys(None, jnp.int32(0), 4) is None
    four, two = (dropout_keys(1, jnp.int32(7), count) for count in (4, 2))
    assert four is not None and two is not None and four.shape == (4,)
    data = jax.random.key_data(four)
    assert len({tuple(key) for key in data.tolist()}) == 4
    chex.assert_trees_all_equal(data[:2], jax.random.key_data(two))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 7), 2)
    chex.assert_trees_all_equal(data[2], jax.random.key_data(key))


def test_micro_batches_drop_independently():
    """Of two equal halves, one key would make two equal losses."""
    half = jax.tree.map(lambda x: x[:2], batch(4))
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), half)
    assert abs(loss(0, "sft", given=twice, micro_batches=2) - loss(0, "sft", given=half)) > 1e-4
