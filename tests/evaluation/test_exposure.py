"""ExAccErr by hand, and from samples against the exact sum over every prefix of a tiny language."""

import itertools

import jax
import numpy as np
import pytest

from minillm_jax.evaluation import divergence, exposure
from minillm_jax.rollout import Warp, generate
from minillm_jax.types import Sequences
from tests.toy_models import full_logits, toy

VOCAB, SLOTS, END = 4, 4, 0
STUDENT, Q = toy(2, vocab=VOCAB, sharpness=0.2)
TEACHER, P = toy(7, vocab=VOCAB, sharpness=0.2)
PROMPTS = np.array([[1, 2], [3, 1]], np.int32)


def test_by_hand_with_an_answer_that_has_ended():
    # One prompt: the second of two samples ends after a token, so the mean at 2 is of the first.
    own = np.array([[[1.0, 6.0], [3.0, 99.0]]]), np.array([[[1, 1], [1, 0]]])
    given = np.array([[[1.0, 2.0]]]), np.ones((1, 1, 2))
    found = exposure.curve(own, given)
    assert found["excess"] == pytest.approx([100.0, 100 * (8 - 3) / 3])
    assert found["alive"] == [1.0, 0.5]
    assert np.isnan(found["deviation"]).all()


def test_a_prompt_whose_answers_have_ended_does_not_count_as_zero():
    kl = np.array([[[1.0, 0.0]], [[1.0, 5.0]]])
    own = exposure.by_prompt(kl, [[[1, 0]], [[1, 1]]])
    given = exposure.by_prompt(np.ones((2, 1, 2)), np.ones((2, 1, 2)))
    assert exposure.excess_error(own, given) == pytest.approx([0.0, 200.0])


def test_the_curve_ends_where_all_answers_have():
    kl, mask = np.ones((2, 3, 4)), np.zeros((2, 3, 4), bool)
    mask[..., :3] = True
    found = exposure.curve((kl, mask), (kl, np.ones_like(mask)))
    assert found["excess"][:3] == [0.0] * 3 and np.isnan(found["excess"][3])
    assert exposure.last(found) == 0.0 and found["alive"] == [1.0, 1.0, 1.0, 0.0]
    assert found["reach"] == 3
    assert np.isnan(exposure.last({"excess": [1.0], "reach": 0}))


def test_a_curve_reaches_as_far_as_a_twentieth_of_the_answers():
    kl, mask = np.ones((1, 40, 3)), np.ones((1, 40, 3), bool)
    mask[:, 2:, 1] = mask[:, 1:, 2] = False  # 2 of 40, then 1
    found = exposure.curve((kl, mask), (2 * kl, np.ones_like(mask)))
    assert found["reach"] == 2 and exposure.last(found) == -50.0


def test_the_band_is_that_of_the_prompts():
    rng = np.random.default_rng(0)
    prompts = 300
    kl = rng.gamma(2.0, 1.0, (prompts, 1, 1))
    ones = np.ones((prompts, 1, 1))
    found = exposure.curve((kl, ones), (ones, ones))
    # The excess is the mean of KL - 1 in percent, and its error that of a mean.
    np.testing.assert_allclose(
        found["deviation"], 100 * kl.std(ddof=1) / np.sqrt(prompts), rtol=0.15
    )


@jax.jit
def distributions(batch):
    """q and p at every position of the responses, [B, N, V] each."""
    models = (STUDENT, Q), (TEACHER, P)
    return [jax.nn.softmax(full_logits(model, batch, VOCAB)) for model in models]


def exact():
    """Exact E[KL] by position on prefixes of q and of p that have not ended: two arrays [R, N]."""
    words = np.array(list(itertools.product(range(1, VOCAB), repeat=SLOTS)), np.int32)
    found = []
    for prompt in PROMPTS:
        batch = Sequences(
            np.tile(prompt, (len(words), 1)),
            np.ones((len(words), 2), bool),
            words,
            np.ones_like(words, bool),
        )
        q, p = (np.asarray(side, np.float64) for side in distributions(batch))
        kl = (p * np.log(p / q)).sum(axis=-1)  # [words, N]
        rows = []
        for model in (q, p):
            chosen = np.take_along_axis(model, words[..., None], axis=2)[..., 0]
            expected = []
            for t in range(SLOTS):
                # Every prefix of t words occurs as often; that cancels in the ratio.
                weight = chosen[:, :t].prod(axis=1)
                expected.append((weight * kl[:, t]).sum() / weight.sum())
            rows.append(expected)
        found.append(rows)
    return np.moveaxis(np.array(found), 1, 0)


def sampled(config, params, seed, samples=3000):
    prompt = np.repeat(PROMPTS, samples, axis=0)
    mask = np.ones_like(prompt, bool)
    answer = generate(
        config, params, prompt, mask, jax.random.key(seed),
        slots=SLOTS, warp=Warp(), eos_id=END, pad_id=END, vocab=VOCAB,
    )  # fmt: skip
    batch = Sequences(prompt, mask, answer.tokens, answer.mask)
    kl = divergence.sums(STUDENT, TEACHER, Q, P, batch, VOCAB)["forward_kl_at"]
    shape = (len(PROMPTS), samples, SLOTS)
    return np.reshape(kl, shape), np.reshape(answer.mask, shape)


def test_samples_come_to_the_exact_sum_over_all_prefixes():
    own, given = exact()
    expected = exposure.excess_error(own, given)
    assert np.abs(expected[1:]).min() > 3  # percent: else any estimate would pass
    own_samples, given_samples = sampled(STUDENT, Q, 0), sampled(TEACHER, P, 1)
    alive = own_samples[1].mean(axis=(0, 1))
    assert alive[0] == 1 and alive[-1] < 0.8  # answers do end
    found = exposure.curve(own_samples, given_samples)
    np.testing.assert_allclose(exposure.by_prompt(*own_samples), own, rtol=0.1)
    np.testing.assert_allclose(found["excess"], expected, atol=2.0)
    assert found["excess"][0] == pytest.approx(0, abs=1e-3)  # the first state is the prompt's
