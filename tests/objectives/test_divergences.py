"""Divergences by name: against numpy in float64, gradients, in blocks, and TAID's schedule."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.objectives import divergences, taid, token, vocab
from minillm_jax.objectives.divergences import DIVERGENCES
from minillm_jax.types import InputError
from tests.objectives.test_vocab_scores import MASK, inputs

each = pytest.mark.parametrize("name", DIVERGENCES)
# Not the defaults: a parameter that is dropped on the way would go unnoticed.
PARAMETERS = {"jsd": 0.3, "adaptive_kl": 0.6, "interpolated_kl": 0.7} | dict.fromkeys(
    ("skew_forward_kl", "skew_reverse_kl"), 0.2
)


def kl(a, b):
    return float(np.sum(a * np.log(a / b)))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def weights(q, p, mu):
    order = np.argsort(-p)
    head = np.cumsum(p[order]) <= mu
    head[0] = True
    gap = np.abs(p - q)[order]
    share = gap[head].sum() / gap.sum()
    return share, 1 - share


def adaptive(q, p, mu):
    share, _ = weights(q, p, mu)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def plain(name, z_q, z_p, x):
    """The formulas once more, for one position."""
    q, p = softmax(z_q), softmax(z_p)
    mixed = x * p + (1 - x) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "cross_entropy": lambda: -(p * np.log(q)).sum(),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: x * kl(p, mixed) + (1 - x) * kl(q, mixed),
        "skew_forward_kl": lambda: kl(p, mixed),
        "skew_reverse_kl": lambda: kl(q, (1 - x) * p + x * q),
        "total_variation": lambda: np.abs(q - p).sum() / 2,
        "adaptive_kl": lambda: adaptive(q, p, x),
        "interpolated_kl": lambda: kl(softmax((1 - x) * z_q + x * z_p), q),
    }[name]()


def pair(seed=0, shape=(3, 9)):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=shape), 2 * rng.normal(size=shape)


@functools.cache
def computed():
    """Values and gradients to the student of every divergence, from one program."""
    q, p = pair()

    @jax.jit
    def run(q, p):
        def both(name):
            def values(q):
                found = DIVERGENCES[name].function(q, p, PARAMETERS.get(name, 0.0))
                return found.sum(), found

            return jax.grad(values, has_aux=True)(q)

        return {name: both(name) for name in DIVERGENCES}

    with jax.enable_x64(True):
        return jax.device_get(run(jnp.asarray(q), jnp.asarray(p)))


@each
def test_values_are_those_of_numpy(name):
    want = [plain(name, *row, PARAMETERS.get(name, 0.0)) for row in zip(*pair(), strict=True)]
    np.testing.assert_allclose(computed()[name][1], want, rtol=1e-10)


@each
def test_gradients_by_finite_differences(name):
    """Weights and targets that count as constants are fixed in the differences."""
    x = PARAMETERS.get(name, 0.0)
    for got, z_q, z_p in zip(computed()[name][0], *pair(), strict=True):
        q, p = softmax(z_q), softmax(z_p)
        target, share = softmax((1 - x) * z_q + x * z_p), weights(q, p, x)[0]

        def value(z, z_p=z_p, p=p, target=target, share=share):
            if name == "interpolated_kl":
                return kl(target, softmax(z))
            if name == "adaptive_kl":
                return share * kl(p, softmax(z)) + (1 - share) * kl(softmax(z), p)
            return plain(name, z, z_p, x)

        steps = 1e-5 * np.eye(len(z_q))
        want = [(value(z_q + h) - value(z_q - h)) / 2e-5 for h in steps]
        np.testing.assert_allclose(got, want, atol=1e-8)


def test_the_head_is_that_of_a_sort():
    """Also where the most probable id alone is more than mu, and where the head is all there is."""
    q, p = pair(2, (40, 17))
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            run = jax.jit(token.adaptive_kl)
            for mu in (0.0, 0.2, 0.5, 0.9, 1.5):
                got = run(jnp.asarray(q, dtype), jnp.asarray(p, dtype), dtype(mu))
                want = [adaptive(softmax(a), softmax(b), mu) for a, b in zip(q, p, strict=True)]
                np.testing.assert_allclose(got, want, rtol=2e-5)
            same = run(jnp.asarray(q, dtype), jnp.asarray(q, dtype), dtype(0.5))
            np.testing.assert_allclose(same, np.zeros(40), atol=1e-5)


def test_in_blocks_they_are_those_of_the_full_logits():
    """Value, gradients to trunk and head, and a parameter that may differ from token to token."""
    with jax.enable_x64(True):
        args: Any = inputs(dtype=np.float64)

        def loss(scores, extras, mask):
            return 0.7 * scores["divergence"] + 0.5 * scores["log_q"]

        def blocks(name, *q, scored=False):
            found: Any = DIVERGENCES[name]
            x = PARAMETERS.get(name, 0.0)
            if scored:

                def short(scores, extras, mask):
                    return 0.7 * found.scored(scores) + 0.5 * scores["log_q"]

                value, scores = vocab.loss_sum(short, *q, *args[3:], block=8)
                return value, found.scored(scores)

            def between(z_q, z_p, t):
                return found.function(z_q, z_p, t if found.scheduled else x)

            given: Any = (loss, *q, *args[3:], jnp.full(MASK.shape, x, jnp.float64))
            value, scores = vocab.loss_sum(*given, divergence=between, block=8)
            return value, scores["divergence"]

        def logits(hidden, weight, bias):
            return jnp.einsum("bnd,vd->bnv", hidden, weight) + bias[None, None]

        def full(name, *q):
            z_q, z_p = logits(*q), logits(*args[3:6])
            found = DIVERGENCES[name].function(z_q, z_p, PARAMETERS.get(name, 0.0))
            values = 0.7 * found + 0.5 * token.log_prob_of(z_q, args[6])
            return jnp.sum(jnp.where(MASK, values, 0)), jnp.where(MASK, found, 0)

        @jax.jit
        def all_of_them(*q):
            def of(function, name):
                return jax.value_and_grad(partial(function, name), (0, 1, 2), has_aux=True)(*q)

            found = {name: (of(blocks, name), of(full, name)) for name in DIVERGENCES}
            closed = partial(blocks, scored=True)
            found |= {
                f"{name}, scored": (of(closed, name), found[name][1])
                for name, one in DIVERGENCES.items()
                if one.scored
            }
            return found, blocks("jsd", *q)

        found, without_gradient = all_of_them(*args[:3])
        for name, (got, want) in found.items():
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(without_gradient[0], found["jsd"][1][0][0], rtol=1e-10)


@pytest.mark.optimized
def test_no_logits_persist():
    rows, positions, size = 2, 64, 512
    args: Any = (
        *(jnp.zeros((rows, positions, 4)), jnp.zeros((size, 4)), None) * 2,
        *(jnp.zeros((rows, positions), jnp.int32), jnp.ones((rows, positions), bool)),
    )

    def run(*args):
        between = DIVERGENCES["jsd"].function
        options = {"divergence": lambda q, p, _: between(q, p, 0.5), "block": 8}
        return vocab.loss_sum(lambda scores, *_: scores["divergence"], *args, **options)[0]

    compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(*args).compile()
    used = compiled.memory_analysis()
    assert used is not None and used.temp_size_in_bytes < rows * positions * size * 4 / 2


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("jsd", 1.5, "parameter=1.5: beta of jsd lies from 0 to 1"),
        ("skew_forward_kl", 1.0, "skew of skew_forward_kl lies from 0 to 0.99"),
        ("forward_kl", 0.5, "parameter=0.5: forward_kl has none"),
    ],
)
def test_a_parameter_that_is_none_is_refused(name, value, says):
    with pytest.raises(InputError, match=says):
        DIVERGENCES[name].checked(name, value)
    with pytest.raises(InputError, match="divergence='kl': choose from forward_kl, cross_entropy"):
        divergences.find("kl")


def test_the_schedule_of_taid_is_that_of_its_code():
    """In plain Python, with losses that fall, rise and are not finite."""
    schedule = taid.Schedule(steps=50, start=0.2, alpha=0.2, beta=0.9)
    rng = np.random.default_rng(0)
    losses = list(3.0 * 0.9 ** np.arange(12) + 0.2 * rng.random(12)) + [np.nan, 1.0, 2.0]
    t, momentum, previous = 0.2, 0.0, None
    progress = schedule.begin()
    for step, loss in enumerate(losses):
        if np.isfinite(loss):
            if previous is not None:
                momentum = 0.9 * momentum + 0.1 * (previous - loss) / previous
                moved = t + 0.2 * (1 - t) / (1 + np.exp(-momentum))
                t = min(1.0, max(0.2 + 0.8 * step / 50, moved))
            previous = loss
        progress = schedule.advance(progress, jnp.float32(loss), jnp.int32(step))
        np.testing.assert_allclose(progress.t, t, rtol=1e-5)
    assert t > 0.2 + 0.8 * len(losses) / 50  # it was ahead of the updates
    late = schedule.advance(progress, jnp.float32(1.0), jnp.int32(50))
    assert float(late.t) == 1.0
    with pytest.raises(InputError, match="parameter=1.0: t of taid starts from 0 to below 1"):
        taid.Schedule(10, 1.0)
