import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.models import head, hidden_states, logits, native
from minillm_jax.models.cache import heads_together
from minillm_jax.models.ragged import room
from minillm_jax.rollout import Response, Warp, generate, generate_shrinking, shrinking
from tests.array_sizes import shapes
from tests.toy_models import prompts, toy

VOCAB, EOS = 7, 0
GREEDY = Warp(temperature=0.0)
MODEL = CONFIG, PARAMS = toy(0, vocab=VOCAB)


def answer(
    prompt, mask, *, model=MODEL, warp=GREEDY, slots=12, key=0, vocab=VOCAB, eos=EOS, **more
):
    config, params = model
    return generate(
        config, params, prompt, mask, jax.random.key(key),
        slots=slots, warp=warp, eos_id=eos, pad_id=EOS, vocab=vocab, **more,
    )  # fmt: skip


def shrunk(
    prompt, mask, monkeypatch, *, model=MODEL, warp, slots=12, key=0, worth=0, eos=EOS, **more
):
    """The answer, and the sizes of the batches that went on without those that had ended."""
    sizes, go_on = [], shrinking._next

    def spy(config, weights, writing, **options):
        sizes.append(len(writing.done))
        return go_on(config, weights, writing, **options)

    monkeypatch.setattr(shrinking, "_next", spy)
    monkeypatch.setattr(shrinking, "WORTH", worth)
    config, params = model
    found = generate_shrinking(
        config, params, prompt, mask, jax.random.key(key),
        slots=slots, warp=warp, eos_id=eos, pad_id=EOS, vocab=VOCAB, **more,
    )  # fmt: skip
    return found, sizes


def scores(prompt, mask, found):
    """Logits [B, N, V] that the full forward pass gives at the response positions."""
    tokens = jnp.concatenate([prompt, found.tokens], axis=1)
    mask = jnp.concatenate([mask, found.mask], axis=1)
    hidden = hidden_states(CONFIG, PARAMS, tokens, mask)[:, prompt.shape[1] - 1 : -1]
    return logits(head(CONFIG, PARAMS), hidden)


def test_greedy_is_the_argmax_of_the_full_forward():
    prompt, mask = prompts(32, 5, VOCAB)
    found = answer(prompt, mask)
    best = jnp.argmax(scores(prompt, mask, found), axis=-1)
    assert found.mask.sum() > 20
    assert jnp.all((best == found.tokens) | ~found.mask)


def test_pairs_of_tokens_have_the_probabilities_of_the_model():
    prompt, mask = prompts(1, 5, VOCAB)
    rows = 20_000
    many = jnp.tile(prompt, (rows, 1)), jnp.tile(mask, (rows, 1))
    found = answer(*many, warp=Warp(), slots=2, key=2)
    pairs = np.asarray(found.tokens)[:, 0] * VOCAB + np.asarray(found.tokens)[:, 1]
    every = jnp.stack(jnp.meshgrid(jnp.arange(VOCAB), jnp.arange(VOCAB), indexing="ij"), -1)
    given = Response(every.reshape(-1, 2), jnp.ones((VOCAB**2, 2), bool))
    asked = jnp.tile(prompt, (VOCAB**2, 1)), jnp.tile(mask, (VOCAB**2, 1))
    log_probs = jax.nn.log_softmax(scores(*asked, given))
    chosen = jnp.take_along_axis(log_probs, given.tokens[..., None], 2)
    expected = np.array(jnp.exp(chosen.sum((1, 2)))).reshape(VOCAB, VOCAB)
    expected[EOS] = [expected[EOS].sum(), *[0] * (VOCAB - 1)]  # nothing follows the end but padding
    seen = np.bincount(pairs, minlength=VOCAB**2) / rows
    np.testing.assert_allclose(seen, expected.ravel(), atol=4 * 0.5 / rows**0.5)
    assert (expected > 0.01).sum() > 8


def test_greedy_answers_beside_sampled_ones_change_neither():
    prompt, mask = prompts(32, 5, VOCAB)
    drawn, best = answer(prompt, mask, warp=Warp(), key=4), answer(prompt, mask)
    both = answer(prompt, mask, warp=Warp(), key=4, with_greedy=True)
    for name in ("tokens", "mask"):
        parts = [getattr(drawn, name), getattr(best, name)]
        np.testing.assert_array_equal(getattr(both, name), jnp.concatenate(parts))
    assert (drawn.tokens != best.tokens).any()


@pytest.mark.parametrize("greedy", [False, True])
def test_states_are_those_of_the_full_forward(greedy, monkeypatch):
    prompt, mask = prompts(16, 5, VOCAB)
    mask = mask.at[3].set(False)  # a row that only fills the batch
    asked = {"warp": Warp(no_repeat_ngram=3), "key": 4, "with_greedy": greedy, "with_states": True}
    found = answer(prompt, mask, **asked)
    shrank, sizes = shrunk(prompt, mask, monkeypatch, **asked)
    assert sizes and answer(prompt, mask).hidden is None
    twice = [jnp.concatenate([x, x]) if greedy else x for x in (prompt, mask)]
    for one in (found, shrank):
        tokens = jnp.concatenate([twice[0], one.tokens], 1)
        real = jnp.concatenate([twice[1], one.mask], 1)
        full = hidden_states(CONFIG, PARAMS, tokens, real)[:, prompt.shape[1] - 1 : -1]
        expected = np.where(one.mask[..., None], full, 0)
        assert one.mask.sum() > 20
        assert one.hidden is not None
        np.testing.assert_allclose(one.hidden, expected, atol=1e-5)


def test_mask_ends_with_the_first_end_of_sequence():
    prompt, mask = prompts(32, 5, VOCAB)
    found = answer(prompt, mask, warp=Warp(), slots=4, key=1)
    ended = 0
    for tokens, real in zip(np.asarray(found.tokens), np.asarray(found.mask), strict=True):
        length = int(real.sum())
        assert real[:length].all() and (tokens[length:] == EOS).all()
        assert EOS not in tokens[: length - 1]
        ended += length < len(tokens)
        assert length == len(tokens) or tokens[length - 1] == EOS
    assert 0 < ended < 32


def test_width_of_the_padding_changes_nothing():
    prompt, mask = prompts(6, 5, VOCAB)
    wide = jnp.pad(prompt, ((0, 0), (4, 0)), constant_values=3)
    found = answer(prompt, mask, warp=Warp(no_repeat_ngram=3), key=2)
    again = answer(wide, jnp.pad(mask, ((0, 0), (4, 0))), warp=Warp(no_repeat_ngram=3), key=2)
    np.testing.assert_array_equal(found.tokens, again.tokens)


def test_prompts_read_without_what_they_share_get_the_same_answers(monkeypatch):
    prompt, mask = prompts(16, 5, VOCAB)
    prompt = prompt.at[:, -1].set(3).at[4:8].set(prompt[0])
    mask = mask.at[4:8].set(mask[0])
    most = room(prompt, mask, [n / 40 for n in range(40)])
    assert most is not None and most < mask.sum()
    plain = answer(prompt, mask, warp=Warp(), key=7)
    found = answer(prompt, mask, warp=Warp(), key=7, most=most)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    for worth in (0, 64):
        again, _ = shrunk(prompt, mask, monkeypatch, warp=Warp(), key=7, worth=worth, most=most)
        np.testing.assert_array_equal(again.tokens, plain.tokens)
    lost = answer(prompt, mask, warp=Warp(), key=7, most=most // 2)
    assert (lost.tokens != plain.tokens).any()


def test_rows_that_fill_the_batch_stay_empty_and_change_no_other():
    prompt, mask = prompts(3, 5, VOCAB)
    found = answer(prompt, mask.at[1].set(False))
    assert found.mask.any(axis=1).tolist() == [True, False, True]
    drawn = answer(prompt, mask, warp=Warp(), key=3)
    more = [jnp.concatenate([x, x]) for x in (prompt, mask)]
    np.testing.assert_array_equal(answer(*more, warp=Warp(), key=3).tokens[:3], drawn.tokens)


def test_ids_beyond_the_vocabulary_are_not_drawn():
    prompt, mask = prompts(16, 5, 4)
    found = answer(prompt, mask, warp=Warp(), vocab=4, eos=-1)
    assert set(np.unique(found.tokens)) == {0, 1, 2, 3}


def test_ban_leaves_no_repeated_ngram():
    prompt, mask = prompts(8, 5, VOCAB)
    found = answer(prompt, mask, warp=Warp(no_repeat_ngram=2), slots=20, eos=-1)
    for row, real, tokens in zip(prompt, mask, found.tokens, strict=True):
        text = row[real].tolist() + tokens.tolist()
        # bigrams inside the prompt may repeat; those that a generated id completes may not
        grams = list(zip(text, text[1:], strict=False))
        fresh = grams[int(real.sum()) - 1 :]
        assert all(gram not in grams[: len(grams) - len(fresh) + i] for i, gram in enumerate(fresh))


@pytest.mark.parametrize("greedy", [False, True])
def test_answers_stay_the_same_where_rows_that_ended_leave_the_batch(greedy, monkeypatch):
    prompt, mask = prompts(16, 5, VOCAB)
    mask = mask.at[3].set(False)  # a row that only fills the batch
    warp = Warp(no_repeat_ngram=3)
    plain = answer(prompt, mask, warp=warp, key=4, with_greedy=greedy)
    found, sizes = shrunk(prompt, mask, monkeypatch, warp=warp, key=4, with_greedy=greedy)
    assert sizes and sizes == sorted(set(sizes), reverse=True)
    assert set(sizes) <= {1, 2, 4, 8, 16}
    for name in ("tokens", "mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


def test_heads_that_lie_side_by_side_change_no_answer(monkeypatch):
    config, params = toy(0, vocab=VOCAB, kv_heads=4)
    prompt, mask = prompts(16, 5, VOCAB)
    asked = {"warp": Warp(), "key": 4, "with_greedy": True}
    plain = answer(prompt, mask, model=(config, params), **asked)
    monkeypatch.setattr("minillm_jax.models.cache.platform", lambda: "tpu")
    assert heads_together(config) == 4
    as_on_a_tpu = dataclasses.replace(config, max_positions=255), params  # compiled anew
    found = answer(prompt, mask, model=as_on_a_tpu, **asked)
    shrank, sizes = shrunk(prompt, mask, monkeypatch, model=as_on_a_tpu, **asked)
    assert sizes
    for one in (found, shrank):
        np.testing.assert_array_equal(one.tokens, plain.tokens)
        np.testing.assert_array_equal(one.mask, plain.mask)


def test_a_batch_is_halved_only_where_it_is_worth_while(monkeypatch):
    prompt, mask = prompts(16, 5, VOCAB)
    limits = jnp.where(jnp.arange(16) < 14, 3, 10)
    for worth, ways, expected in ((8, 1, [2]), (9, 1, []), (8, 2, [2]), (8, 4, [4]), (8, 16, [])):
        more = {"worth": worth, "ways": ways, "limits": limits, "eos": -1}
        found, sizes = shrunk(prompt, mask, monkeypatch, warp=GREEDY, **more)
        assert sizes == expected
        plain = answer(prompt, mask, eos=-1)
        cut = plain.mask & (jnp.arange(12)[None] < limits[:, None])
        np.testing.assert_array_equal(found.mask, cut)
        np.testing.assert_array_equal(found.tokens, jnp.where(cut, plain.tokens, EOS))


def test_a_prompt_attends_to_itself_and_not_to_the_slots_of_its_answer():
    prompt, mask = prompts(3, 5, VOCAB)
    with native.without():
        program = jax.make_jaxpr(lambda: answer(prompt, mask))()
    found = set(shapes(program.jaxpr))
    assert (3, 5, 5) in found and (3, 1, 5 + 12) in found  # masks: of the prompt, of a token
    assert not any(shape[-2:] == (5, 5 + 12) for shape in found)
