"""Overlap of the first choices against numpy on the full logits."""

import jax
import numpy as np

from minillm_jax.evaluation import divergence
from tests.evaluation.test_divergence import STUDENT, TEACHER, VOCAB, P, Q, batch
from tests.toy_models import full_logits


def test_sums_are_those_of_the_full_logits():
    found, k = batch(), 3
    rows = divergence.sums(STUDENT, TEACHER, Q, P, found, VOCAB, k=k)
    models = (STUDENT, Q), (TEACHER, P)
    z = [np.asarray(jax.jit(lambda m=m: full_logits(m, found, VOCAB))()) for m in models]
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
