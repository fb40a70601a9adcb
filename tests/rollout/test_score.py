"""Reading given responses: rows from their first token on are rows among their padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.rollout import response_states, score
from minillm_jax.types import Sequences
from tests.toy_models import toy

PAIRS = [(1, 1), (1, 9), (3, 7), (6, 1), (6, 4), (4, 0), (2, 8), (5, 5)]  # at most 10 together
SLOTS = 6, 9
CONFIG, PARAMS = toy(0)
CONFIG = dataclasses.replace(CONFIG, positions="learned", max_positions=15)


def batch() -> Sequences:
    rng = np.random.default_rng(0)
    prompts, responses = np.array(PAIRS).T[..., None]
    slots = [np.arange(n)[None] for n in SLOTS]
    masks = slots[0] >= SLOTS[0] - prompts, slots[1] < responses
    prompt, response = (np.where(m, rng.integers(1, 7, m.shape), 0).astype(np.int32) for m in masks)
    return Sequences(prompt, masks[0], response, masks[1])


def params():
    table = np.random.default_rng(1).standard_normal((15, CONFIG.width)).astype(np.float32)
    return {**PARAMS, "embed": {**PARAMS["embed"], "positions": jnp.asarray(table)}}


@pytest.mark.parametrize("max_tokens", [10, 12, 14, 15, 99])
def test_the_states_of_a_narrow_pass_are_those_of_the_wide_one(max_tokens, monkeypatch):
    found, widths, read = batch(), [], score.hidden_states

    def recorded(config, params, tokens, mask, **options):
        widths.append(tokens.shape[1])
        return read(config, params, tokens, mask, **options)

    monkeypatch.setattr(score, "hidden_states", recorded)
    wide = response_states(CONFIG, params(), found)
    narrow = response_states(CONFIG, params(), found, max_tokens=max_tokens)
    assert widths == [15, min(max_tokens, 15)] and narrow.shape == wide.shape
    mask = found.response_mask
    np.testing.assert_allclose(narrow[mask], wide[mask], atol=1e-5)
    assert np.isfinite(np.asarray(narrow)).all()


def test_the_gradient_of_a_narrow_pass_is_that_of_the_wide_one():
    found, weights = batch(), jax.random.normal(jax.random.key(0), (8, 9, CONFIG.width))

    def loss(params, max_tokens):
        hidden = response_states(CONFIG, params, found, max_tokens=max_tokens)
        return jnp.where(found.response_mask[..., None], hidden * weights, 0).sum()

    wide, narrow = (jax.grad(loss)(params(), most) for most in (None, 10))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), narrow, wide)
