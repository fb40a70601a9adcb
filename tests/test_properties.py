"""Properties that hold for any input: templates, packing, masks, samplers, reductions."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.data.corpus import pack
from minillm_jax.data.examples import Example, pad
from minillm_jax.data.templates import prompt_ids
from minillm_jax.data.tokenizer import Tokenizer, load_tokenizer
from minillm_jax.objectives import reduce
from minillm_jax.rollout.warp import NEVER, Warp, choose, warped
from tests.toy_tokenizer import SPECIAL, WORDS, write_toy_tokenizer

quick = settings(max_examples=60, deadline=None)
B, V, M = 3, 11, 6

words = st.lists(st.sampled_from([*WORDS, *SPECIAL, "<|endoftext|>", "\ue000", "é"]), max_size=8)
texts = words.map(" ".join)


@functools.cache
def toy() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_toy_tokenizer(Path(folder)))


@quick
@given(instruction=texts, other=texts, template=st.sampled_from(["chat", "alpaca"]))
def test_special_token_text_in_a_prompt_is_text(instruction, other, template):
    """However many there are in it, a prompt has the special ids that its template writes."""
    plain, given = (
        prompt_ids(toy(), template, text, other and "one") for text in ("one", instruction or "one")
    )
    special = {toy().special_id(name) for name in SPECIAL[:4]}
    kept = [[i for i in ids if i in special] for ids in (plain, given)]
    assert kept[0] == kept[1]


@quick
@given(documents=st.lists(texts, max_size=6), length=st.integers(2, 7))
def test_packing_loses_and_adds_nothing_but_the_last_part(documents, length):
    stream = [i for d in documents if d.strip() for i in (*toy().encode(d.strip()), toy().eos_id)]
    blocks = pack(documents, toy(), length)
    assert blocks.shape == (len(stream) // length, length)
    np.testing.assert_array_equal(blocks.reshape(-1), stream[: blocks.size])


ids = st.lists(st.integers(0, 60), max_size=6).map(tuple)


@quick
@given(pairs=st.lists(st.tuples(ids, ids), min_size=1, max_size=4), more=st.integers(0, 3))
def test_masks_hold_what_was_padded_and_width_changes_nothing(pairs, more):
    examples = [Example(prompt, response) for prompt, response in pairs]
    for width in (6, 6 + more):
        batch = pad(examples, width, width, 63)
        for b, (prompt, response) in enumerate(pairs):
            assert tuple(batch.prompt[b][batch.prompt_mask[b]]) == prompt
            assert tuple(batch.response[b][batch.response_mask[b]]) == response
        assert (np.diff(batch.prompt_mask.astype(int)) >= 0).all()  # padding is on the left
        assert (np.diff(batch.response_mask.astype(int)) <= 0).all()  # and on the right


@functools.partial(jax.jit, static_argnames="warp")
def drawn(warp, logits, history, length, uniform):
    changed = warped(warp, logits, history, length)
    return changed, choose(warp, changed, uniform)


numbers = st.floats(-20, 20, width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(numbers, min_size=B * V, max_size=B * V),
    history=st.lists(st.integers(0, V - 1), min_size=B * M, max_size=B * M),
    length=st.integers(0, M),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    warp=st.sampled_from([Warp(), Warp(0.0), Warp(0.5, 3), Warp(2.0, 0, 0.4), Warp(1, 0, 1, 2)]),
)
def test_a_sampler_draws_what_its_warp_allows(logits, history, length, uniform, warp):
    raw = np.asarray(logits, np.float32).reshape(B, V)
    past = np.asarray(history, np.int32).reshape(B, M)
    changed, found = map(np.asarray, drawn(warp, raw, past, length, jnp.full(B, uniform)))
    allowed = changed > NEVER / 2
    assert ((found >= 0) & (found < V)).all() and allowed[np.arange(B), found].all()
    if warp.temperature == 0:
        assert (raw[np.arange(B), found] == raw.max(1)).all()
    elif not warp.no_repeat_ngram:
        assert allowed[np.arange(B), raw.argmax(1)].all()  # the best id is never excluded
    if warp.top_k:  # ties may let in more
        assert (raw >= np.sort(raw)[:, [-warp.top_k]])[allowed].all()
    if warp.top_p < 1:  # no fewer ids have that mass; ties may let in more
        p = np.asarray(jax.nn.softmax(raw / warp.temperature), np.float64)
        worst = np.where(allowed, p, np.inf).min(axis=1, keepdims=True)
        assert (np.where(p > worst, p, 0).sum(axis=1) < warp.top_p + 1e-5).all()
        assert (np.where(allowed, p, 0).sum(axis=1) > warp.top_p - 1e-5).all()
    if warp.no_repeat_ngram and length:
        grams = [set(zip(row[: length - 1], row[1:length], strict=True)) for row in past.tolist()]
        for b, token in enumerate(found):
            assert (past[b, length - 1], token) not in grams[b]


@quick
@given(
    values=st.lists(numbers, min_size=12, max_size=12),
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
    cut=st.integers(0, 4),
    per=st.sampled_from(["token", "sequence"]),
)
def test_reductions_of_parts_are_those_of_the_whole(values, mask, cut, per):
    x, m = np.asarray(values, np.float32).reshape(4, 3), np.asarray(mask).reshape(4, 3)
    x = np.where(m, x, np.nan)  # what is masked never counts
    whole = reduce.total(x, m, per)
    parts = reduce.add(reduce.total(x[:cut], m[:cut], per), reduce.total(x[cut:], m[cut:], per))
    np.testing.assert_allclose(parts.sum, whole.sum, rtol=1e-5, atol=1e-4)
    assert parts.count == whole.count == (m.sum() if per == "token" else m.any(1).sum())
    if m.any():
        ess = float(reduce.effective_sample_size(np.abs(x) + 0.1, m))
        assert 1 / m.sum() - 1e-5 <= ess <= 1 + 1e-5
