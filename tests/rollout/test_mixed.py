import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.models import head, hidden_states, logits, native
from minillm_jax.models.ragged import room
from minillm_jax.rollout import Mixing, collect, response_states
from minillm_jax.rollout.mixed import longest_chunk, scored_at_once, throw_coins
from minillm_jax.rollout.warp import draw
from minillm_jax.sharding import make_mesh
from tests.array_sizes import shapes
from tests.toy_models import prompts, toy

VOCAB, EOS = 7, 0
STUDENT, Q = toy(0, vocab=VOCAB)
TEACHER, P = toy(1, vocab=VOCAB, layers=3, width=24)


def mixing(**changes):
    settings: dict[str, Any] = {"slots": 12, "alpha": 0.3, "chunk": 3, "eos_id": EOS, "pad_id": EOS}
    settings |= {"vocab": VOCAB} | changes
    return Mixing(**settings)


def rollout(key=0, rows=8, **changes):
    prompt, mask = prompts(rows, 5, VOCAB)
    return collect(STUDENT, TEACHER, Q, P, prompt, mask, jax.random.key(key), mixing(**changes))


def log_probs(config, params, found):
    """log-probabilities [B, N, V] of the full forward pass at the response positions."""
    return jax.nn.log_softmax(
        logits(head(config, params), response_states(config, params, found)), axis=-1
    )


def drawn(log_prob, found):
    chosen = jnp.take_along_axis(log_prob, found.response[..., None], axis=-1)[..., 0]
    return jnp.where(found.response_mask, chosen, 0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [0, 1, 3, 12])
def test_scores_of_the_loop_are_those_of_a_scoring_pass(alpha, chunk):
    found = rollout(rows=16, alpha=alpha, chunk=chunk)
    assert 20 < found.response_mask.sum() < found.response_mask.size  # some rows ended
    log_q, log_p = (
        drawn(log_probs(*model, found), found) for model in ((STUDENT, Q), (TEACHER, P))
    )
    np.testing.assert_allclose(found.log_q, log_q, atol=1e-5)
    np.testing.assert_allclose(found.log_p, log_p, atol=1e-5)
    mixture = jnp.log((1 - alpha) * jnp.exp(log_q) + alpha * jnp.exp(log_p))
    np.testing.assert_allclose(found.log_mix, mixture, atol=1e-5)


def test_each_model_computes_in_its_own_type():
    """As the updates read them: the student in that of the mixing, the teacher in its own."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P)
    prompt, mask = prompts(8, 5, VOCAB)
    found = collect(
        STUDENT, TEACHER, Q, low, prompt, mask, jax.random.key(1), mixing(dtype="bfloat16")
    )
    assert found.teacher_hidden.dtype == jnp.bfloat16 and found.log_q.dtype == jnp.float32
    log_q, exact = (
        drawn(
            jax.nn.log_softmax(
                logits(head(STUDENT, Q), response_states(STUDENT, Q, found, dtype=dtype)), -1
            ),
            found,
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    # Sums in another order round otherwise, but by as much; in float32 the gap is 1e-6.
    gap, rounding = (np.abs(x - exact).mean() for x in (found.log_q, log_q))
    assert 0.3 < gap / rounding < 3


def test_stored_teacher_states_are_those_of_the_full_forward():
    found = rollout()
    tokens = jnp.concatenate([found.prompt, found.response], axis=1)
    mask = jnp.concatenate([found.prompt_mask, found.response_mask], axis=1)
    states = hidden_states(TEACHER, P, tokens, mask)[:, found.prompt.shape[1] - 1 : -1]
    expected = jnp.where(found.response_mask[..., None], states, 0)
    np.testing.assert_allclose(found.teacher_hidden, expected, atol=1e-5)


def test_frequencies_are_those_of_the_mixture(monkeypatch):
    """Every sequence of three ids, over 60,000 coin schedules, against the product of p~."""
    monkeypatch.setattr(native, "usable", lambda *_: False)  # 60,000 at once
    vocab, slots, runs, alpha = 3, 3, 60_000, 0.4
    student, q = toy(2, vocab=vocab)
    teacher, p = toy(3, vocab=vocab)
    prompt, mask = jnp.array([[1, 2]]), jnp.ones((1, 2), bool)
    settings = mixing(slots=slots, alpha=alpha, chunk=2, eos_id=-1, vocab=vocab)

    def one(key):
        return collect(student, teacher, q, p, prompt, mask, key, settings).response[0]

    drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), runs)))
    counts = np.bincount(drawn @ vocab ** np.arange(slots)[::-1], minlength=vocab**slots)

    every = jnp.array(list(itertools.product(range(vocab), repeat=slots)))
    tokens = jnp.concatenate([jnp.tile(prompt, (len(every), 1)), every], axis=1)
    exact = jnp.ones(len(every))
    both = []
    for config, params in ((student, q), (teacher, p)):
        hidden = hidden_states(config, params, tokens, jnp.ones_like(tokens, bool))[:, 1:-1]
        both.append(jax.nn.softmax(logits(head(config, params), hidden), axis=-1))
    blend = (1 - alpha) * both[0] + alpha * both[1]
    exact = jnp.prod(jnp.take_along_axis(blend, every[..., None], axis=-1)[..., 0], axis=1)
    expected = np.asarray(exact, np.float64) * runs
    # The statistic has 26 degrees of freedom; 60 is beyond its 99.98 % point.
    assert np.sum((counts - expected) ** 2 / expected) < 60
    # The same test sees the difference from the student alone.
    alone = jnp.prod(jnp.take_along_axis(both[0], every[..., None], axis=-1)[..., 0], axis=1)
    alone = np.asarray(alone, np.float64) * runs
    assert np.sum((counts - alone) ** 2 / alone) > 600


def test_same_key_same_tokens_whatever_the_chunk():
    """The chunk size is a matter of speed alone."""
    first, *others = (rollout(key=5, chunk=chunk).response for chunk in (1, 4, 12, 0))
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert (rollout(key=6).response != first).any()


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (1, {}, 16),  # 0.8^15 is more than a 32nd, 0.8^16 is less
        (8, {}, 16),
        (16, {}, 8),
        (64, {}, 6),
        (1, {"alpha": 0.5}, 5),
        (1, {"alpha": 1.0}, 1),
        (1, {"alpha": 0.0}, 128),
        (4, {"alpha": 0.0}, 32),
        (1, {"alpha": 1e-310}, 128),
        (1, {"slots": 12}, 12),
        (1, {"chunk": 40}, 40),
        (1, {"chunk": 40, "slots": 12}, 12),
    ],
)
def test_the_longest_chunk(rows, changes, expected):
    assert (
        longest_chunk(mixing(**{"alpha": 0.2, "chunk": 0, "slots": 256} | changes), rows)
        == expected
    )


def test_chunks_are_by_the_rows_of_a_device():
    settings = mixing(alpha=0.2, chunk=0, slots=256)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        assert longest_chunk(settings, 128) == 8 and scored_at_once(256, 128) == 8
        assert longest_chunk(settings, 127) == 6  # of rows that stay whole


@pytest.mark.parametrize(
    ("slots", "rows", "expected"),
    [(64, 1, 64), (129, 1, 65), (256, 4, 32), (256, 64, 8), (3, 9, 3)],
)
def test_positions_that_are_scored_at_once(slots, rows, expected):
    assert scored_at_once(slots, rows) == expected


def test_the_teacher_draws_where_the_coins_say():
    """Every token is the draw by its uniform number from the model whose turn it is."""
    key, settings = jax.random.key(4), mixing(eos_id=-1)
    found = rollout(key=4, rows=8, eos_id=-1)
    coins = throw_coins(key, settings)
    assert coins.shape == (12,) and 0 < coins.sum() < 12
    uniforms = jax.random.uniform(jax.random.split(key)[1], (8, 12))
    q, p = (log_probs(*model, found) for model in ((STUDENT, Q), (TEACHER, P)))
    source = jnp.where(coins[None, :, None], p, q)
    for t in range(12):
        np.testing.assert_array_equal(found.response[:, t], draw(source[:, t], uniforms[:, t]))


def test_prompts_read_without_what_they_share_give_the_same_rollout():
    prompt, mask = prompts(8, 5, VOCAB)
    prompt, mask = prompt.at[2:].set(prompt[0]), mask.at[2:].set(mask[0])
    given = STUDENT, TEACHER, Q, P, prompt, mask, jax.random.key(2), mixing()
    plain, found = collect(*given), collect(*given, most=room(prompt, mask, [0.3, 0.5]))
    np.testing.assert_array_equal(found.response, plain.response)
    np.testing.assert_allclose(found.log_q, plain.log_q, atol=1e-5)
    np.testing.assert_allclose(found.teacher_hidden, plain.teacher_hidden, atol=1e-5)
    assert (collect(*given, most=3).response != plain.response).any()


def test_rows_that_fill_the_batch_stay_empty_and_change_no_other():
    prompt, mask = prompts(3, 5, VOCAB)
    mask = mask.at[2].set(False)
    found = collect(STUDENT, TEACHER, Q, P, prompt, mask, jax.random.key(0), mixing())
    assert found.response_mask.any(axis=1).tolist() == [True, True, False]
    assert (found.log_q[2] == 0).all() and (found.teacher_hidden[2] == 0).all()
    alone = collect(STUDENT, TEACHER, Q, P, prompt[:2], mask[:2], jax.random.key(0), mixing())
    np.testing.assert_array_equal(found.response[:2], alone.response)


def test_a_prompt_attends_to_itself_and_not_to_the_slots_of_its_response():
    prompt, mask = prompts(3, 5, VOCAB)

    def collection(key):
        with native.without():
            return collect.__wrapped__(STUDENT, TEACHER, Q, P, prompt, mask, key, mixing())

    found = set(shapes(jax.make_jaxpr(collection)(jax.random.key(0)).jaxpr))
    chunk, slots = 3, 5 + 12 + 3
    assert (3, 5, 5) in found and (3, chunk, slots) in found  # masks: of the prompt, of a chunk
    assert not any(shape[-2:] in ((5, slots), (5, 5 + 12)) for shape in found)
