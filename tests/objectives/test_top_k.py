"""Cut distributions against sums over every outcome of a tiny vocabulary, written in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.objectives import top_k
from minillm_jax.objectives.divergences import DIVERGENCES
from tests.objectives.test_divergences import PARAMETERS, pair, plain, softmax

V = 5
EACH = [name for name, one in DIVERGENCES.items() if not one.scheduled]


def merged(p, ids):
    """The distribution over `ids` and one outcome for all others, outcome by outcome."""
    rest = sum(p[v] for v in range(V) if v not in ids)
    return np.array([*(p[v] for v in ids), *([rest] if len(ids) < V else [])])


@pytest.fixture(scope="module")
def found():
    """By k: ids and log p of the teacher, and of every divergence its value and gradient."""
    q, p = pair(3, (4, V))

    @partial(jax.jit, static_argnums=2)
    def run(q, p, k):
        ids, log_p = top_k.likeliest(p, k)

        def values(name, q):
            cut = top_k.cut(q, ids)
            found = DIVERGENCES[name].function(cut, log_p, PARAMETERS.get(name, 0.0))
            return found.sum(), found

        grads = {n: jax.grad(partial(values, n), has_aux=True)(q) for n in DIVERGENCES}
        same = jax.grad(lambda p: values("reverse_kl", p)[0])(p)
        return ids, log_p, grads, same

    with jax.enable_x64(True):
        return {k: jax.device_get(run(jnp.asarray(q), jnp.asarray(p), k)) for k in range(1, V + 1)}


@pytest.mark.parametrize("k", range(1, V + 1))
def test_values_and_gradients_are_those_of_every_outcome(found, k):
    ids, log_p, grads, same = found[k]
    for row, (z_q, z_p) in enumerate(zip(*pair(3, (4, V)), strict=True)):
        p, chosen = softmax(z_p), ids[row].tolist()
        assert chosen == np.argsort(-p)[:k].tolist()
        cut_p = merged(p, chosen)
        np.testing.assert_allclose(np.exp(log_p[row]), cut_p, rtol=1e-10)

        def value(name, z, cut_p=cut_p, chosen=chosen):
            cut_q = merged(softmax(z), chosen)
            return plain(name, np.log(cut_q), np.log(cut_p), PARAMETERS.get(name, 0.0))

        for name in EACH:
            grad, got = grads[name][0][row], grads[name][1][row]
            np.testing.assert_allclose(got, value(name, z_q), rtol=1e-9, err_msg=name)
            if name != "adaptive_kl":  # whose weights are constants
                steps = 1e-5 * np.eye(V)
                want = [(value(name, z_q + h) - value(name, z_q - h)) / 2e-5 for h in steps]
                np.testing.assert_allclose(grad, want, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(same, 0, atol=1e-12)  # the teacher has nothing to learn


def test_all_ids_are_the_whole_and_fewer_are_less(found):
    q, p = pair(3, (4, V))
    for name, one in DIVERGENCES.items():
        x = PARAMETERS.get(name, 0.0)
        with jax.enable_x64(True):
            whole = jax.value_and_grad(
                lambda q, one=one, x=x: one.function(q, jnp.asarray(p), x).sum()
            )
            value, grad = jax.device_get(whole(jnp.asarray(q)))
        np.testing.assert_allclose(found[V][2][name][1].sum(), value, rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(found[V][2][name][0], grad, atol=1e-10, err_msg=name)
    assert top_k.likeliest(jnp.asarray(p), V)[1].shape == (4, V)  # no rest
    for name in ("forward_kl", "reverse_kl", "jsd", "total_variation", "skew_forward_kl"):
        by_k = np.stack([found[k][2][name][1] for k in range(1, V + 1)])
        assert (by_k[1:] >= by_k[:-1] - 1e-12).all() and (by_k[0] < by_k[-1]).all()


def test_what_is_left_keeps_its_digits():
    """Of 1e-9 of the mass: in float32, 1 - sum p would be 0."""
    logits = jnp.asarray([0.0, -21.0, -22.0, -jnp.inf], jnp.float32)
    _, log_p = top_k.likeliest(logits, 1)
    want = np.log(np.exp(-21.0) + np.exp(-22.0)) - np.log1p(np.exp(-21.0) + np.exp(-22.0))
    np.testing.assert_allclose(log_p, [0.0, want], rtol=1e-6, atol=1e-6)
    grad = jax.grad(lambda z: top_k.cut(z, jnp.asarray([0, 1, 2]))[-1])(jnp.zeros(4))
    np.testing.assert_allclose(grad, [0, 0, 0, 1])
