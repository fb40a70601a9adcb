"""Reading each distinct token once changes no state and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, params_of, tokens_of

from minillm_jax.models import hidden_states
from minillm_jax.models.ragged import find, gather, room, spread

MASK = jnp.array(  # left padding, none, both sides, no token at all
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
# Rows 1 and 2 begin as row 0 does: with four of its tokens, then with three.
TOKENS = tokens_of(*MASK.shape)
TOKENS = TOKENS.at[1, :4].set(TOKENS[0, 3:7]).at[1, 4].set(TOKENS[0, 7] + 1)
TOKENS = TOKENS.at[2, 1:4].set(TOKENS[0, 3:6]).at[2, 4].set(TOKENS[0, 6] + 1)
TOKENS = TOKENS.at[2, 5].set(TOKENS[0, 7])  # the same again after another token: not shared
READ = int(MASK.sum()) - 4 - 3


def test_there_and_back_by_hand():
    mask = jnp.array([[False, True, True], [True, False, False]])
    x = jnp.arange(6.0).reshape(2, 3)
    real = find(x, mask, 4)
    np.testing.assert_array_equal(gather(x, real), [[1, 2, 3, 0]])
    np.testing.assert_array_equal(spread(gather(x, real), real), [[0, 1, 2], [3, 0, 0]])
    weights = jnp.array([[2.0, 3.0, 5.0, 7.0]])
    slope = jax.grad(lambda x: (weights * gather(x, real)).sum())(x)
    np.testing.assert_array_equal(slope, [[0, 2, 3], [5, 0, 0]])
    slope = jax.grad(lambda y: (x * spread(y, real)).sum())(weights)
    np.testing.assert_array_equal(slope, [[1, 2, 3, 0]])


def test_a_common_beginning_is_read_once_by_hand():
    mask = jnp.array([[False, False, False], [False, True, True], [True, True, True]])
    tokens = jnp.array([[7, 7, 7], [0, 7, 8], [7, 9, 8]])
    real = find(tokens, mask, 5)
    np.testing.assert_array_equal(gather(tokens, real), [[7, 8, 9, 8, 0]])
    x = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    there = [[0, 0, 0], [0, 1, 2], [1, 3, 4]]
    np.testing.assert_array_equal(spread(x, real), there)
    slope = jax.grad(lambda x: (spread(x, real) * jnp.arange(9.0).reshape(3, 3)).sum())(x)
    np.testing.assert_array_equal(slope, [[4 + 6, 5, 7, 8, 0]])
    slope = jax.grad(lambda y: (gather(y, real) * x).sum())(tokens.astype(float))
    np.testing.assert_array_equal(slope, [[0, 0, 0], [0, 1, 2], [0, 3, 4]])


def test_room_is_what_is_read_in_few_sizes():
    assert (READ, MASK.size) == (16, 40)
    for shares, most in (((0.4,), 16), ((0.2, 0.5, 0.75), 20), ((0.375, 0.75), 30), ((0.3,), None)):
        assert room(TOKENS, MASK, shares) == most
    order = jnp.array([0, 1, 3, 2])  # of 20 slots 7 are read, of rows 0 and 3, and 13
    parts = TOKENS[order], MASK[order]
    assert room(*parts, (0.35, 0.65, 0.8), micro_batches=2) == 13
    found = []
    jax.eval_shape(lambda tokens, mask: found.append(room(tokens, mask, (0.5,))), TOKENS, MASK)
    assert found == [None]


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_of_all_slots(name):
    config = CONFIGS[name]
    params = params_of(config)
    full = jax.jit(lambda: hidden_states(config, params, TOKENS, MASK))()
    for most in (READ, READ + 5):
        found = jax.jit(lambda most=most: hidden_states(config, params, TOKENS, MASK, most=most))()
        np.testing.assert_allclose(found[MASK], full[MASK], atol=3e-6, rtol=0)
        assert not found[~MASK].any()  # and not just what was asked for without `most`


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "opt_350m"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_are_those_of_all_slots(name, remat):
    config = CONFIGS[name]

    def loss(params, most):
        hidden = hidden_states(config, params, TOKENS, MASK, remat=remat, most=most)
        return jnp.where(MASK[..., None], jnp.sin(hidden), 0).sum()

    one = jax.jit(jax.grad(loss), static_argnums=1)
    params = params_of(config)
    full = one(params, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())),
        one(params, READ + 3),
        full,
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(full)) > 0.1
