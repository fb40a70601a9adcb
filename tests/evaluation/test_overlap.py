"""Overlap of the first choices against numpy on the full logits."""

import jax
import numpy as np
import pytest

from minillm_jax.evaluation import overlap
from minillm_jax.models import head, logits
from minillm_jax.rollout import response_states
from tests.evaluation.test_divergence import STUDENT, TEACHER, VOCAB, P, Q, batch


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """What is compiled here runs for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@jax.jit
def full(found):
    """The logits of q and p [B, N, V]."""
    return [
        logits(head(config, params), response_states(config, params, found))[..., :VOCAB]
        for config, params in ((STUDENT, Q), (TEACHER, P))
    ]


def test_sums_are_those_of_the_full_logits():
    found, k = batch(), 3
    rows = overlap.sums(STUDENT, TEACHER, Q, P, found, VOCAB, k)
    z = [np.asarray(side) for side in full(found)]
    q = np.asarray(jax.nn.softmax(z[0]))
    for b, mask in enumerate(found.response_mask):
        shared = mass = 0.0
        for t in np.flatnonzero(mask):
            top = [set(np.argsort(-side[b, t])[:k].tolist()) for side in z]
            shared += len(top[0] & top[1]) / k
            mass += q[b, t, sorted(top[1])].sum()
        np.testing.assert_allclose(rows["overlap"][b], shared, rtol=1e-5)
        np.testing.assert_allclose(rows["mass"][b], mass, rtol=1e-5)
    np.testing.assert_array_equal(rows["tokens"], [8, 1, 5, 3, 0, 6])
