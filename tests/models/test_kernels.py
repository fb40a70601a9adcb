"""Fused attention: the same numbers as plain XLA, by interpretation, and who gets which kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, GPT2, LLAMA, params_of, tokens_of

from minillm_jax.models import head, hidden_states, kernels, logits
from minillm_jax.sharding import MESH_AXES
from minillm_jax.types import InputError

ATOL = 1e-5  # float32; the kernels add up in another order
# Left padding, right padding, both, none, nothing but padding.
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0], [1] * 7])
MASK = jnp.asarray(np.vstack([MASK, np.zeros((2, 7))]), bool)
ONE_WINDOW = [name for name in CONFIGS if name != "gpt_neo"]


def read(config, mask, tokens):
    """Logits at the real slots and their gradient, jitted."""

    def loss(params):
        hidden = hidden_states(config, params, tokens, mask)
        scores = logits(head(config, params), hidden)
        real = jnp.where(mask[:, :, None], scores, 0.0)
        return jnp.mean(jnp.square(real)), (real, hidden)

    gradient, (real, hidden) = jax.jit(jax.grad(loss, has_aux=True))(params_of(config))
    assert np.isfinite(hidden).all()
    return real, gradient


def compare(config, mask, tokens, name, **tolerance):
    plain = read(dataclasses.replace(config, attention="xla"), mask, tokens)
    found = read(dataclasses.replace(config, attention=name), mask, tokens)
    for a, b in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ONE_WINDOW)
def test_splash_reads_what_xla_reads(name):
    compare(CONFIGS[name], MASK, tokens_of(*MASK.shape), "splash")


# Two blocks with one backward kernel, and three with two; the window spans blocks.
@pytest.mark.parametrize(("slots", "window"), [(600, 200), (1100, 500)])
def test_splash_over_several_blocks_and_slots_that_fill_none(slots, window):
    config = dataclasses.replace(
        CONFIGS["mistral"], layers=1, windows=(window,), max_positions=slots
    )
    mask = jnp.arange(slots)[None] >= 37
    compare(config, mask, tokens_of(1, slots), "splash")
