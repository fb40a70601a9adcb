"""Reading the real slots alone changes no state and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, params_of, tokens_of

from minillm_jax.models import hidden_states
from minillm_jax.models.ragged import find, gather, spread

MASK = jnp.array(  # left padding, none, both sides, no token at all
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
TOKENS = int(MASK.sum())


def test_there_and_back_by_hand():
    mask = jnp.array([[False, True, True], [True, False, False]])
    x = jnp.arange(6.0).reshape(2, 3)
    real = find(mask, 4)
    np.testing.assert_array_equal(gather(x, real), [[1, 2, 3, 0]])
    np.testing.assert_array_equal(spread(gather(x, real), real), [[0, 1, 2], [3, 0, 0]])
    weights = jnp.array([[2.0, 3.0, 5.0, 7.0]])
    slope = jax.grad(lambda x: (weights * gather(x, real)).sum())(x)
    np.testing.assert_array_equal(slope, [[0, 2, 3], [5, 0, 0]])
    slope = jax.grad(lambda y: (x * spread(y, real)).sum())(weights)
    np.testing.assert_array_equal(slope, [[1, 2, 3, 0]])


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_of_all_slots(name):
    config, tokens = CONFIGS[name], tokens_of(*MASK.shape)
    params = params_of(config)
    full = jax.jit(lambda: hidden_states(config, params, tokens, MASK))()
    for most in (TOKENS, TOKENS + 5):
        found = jax.jit(lambda most=most: hidden_states(config, params, tokens, MASK, most=most))()
        np.testing.assert_allclose(found[MASK], full[MASK], atol=3e-6, rtol=0)
        assert not found[~MASK].any()  # and not just what was asked for without `most`


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "opt_350m"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_are_those_of_all_slots(name, remat):
    config, tokens = CONFIGS[name], tokens_of(*MASK.shape)

    def loss(params, most):
        hidden = hidden_states(config, params, tokens, MASK, remat=remat, most=most)
        return jnp.where(MASK[..., None], jnp.sin(hidden), 0).sum()

    one = jax.jit(jax.grad(loss), static_argnums=1)
    params = params_of(config)
    full = one(params, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())),
        one(params, TOKENS + 3),
        full,
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(full)) > 0.1
