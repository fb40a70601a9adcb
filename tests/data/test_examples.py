"""Limits of examples, and padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import write_toy_tokenizer

from minillm_jax.data.examples import Example, make_examples, pad
from minillm_jax.data.sources import Row
from minillm_jax.data.templates import prompt_ids
from minillm_jax.data.tokenizer import Tokenizer, load_tokenizer
from minillm_jax.types import InputError

SHORT = Row("one", "", ("red cat",), "f:1")
LONG = Row("one two three " * 10, "", ("dog",), "f:2")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_toy_tokenizer(tmp_path_factory.mktemp("toy")))


def make(toy: Tokenizer, rows: list[Row], **changes) -> list[Example]:
    limits = {"template": "chat", "max_prompt": 8, "max_response": 4}
    return make_examples(toy, rows, **{**limits, **changes})


def test_a_response_ends_in_the_end_token(toy: Tokenizer):
    (example,) = make(toy, [Row("one", "two", ("red cat", "dog"))])
    assert example.prompt == tuple(prompt_ids(toy, "chat", "one", "two"))
    assert example.response == (*toy.encode("red cat"), toy.eos_id)
    assert make(toy, [SHORT], answers=False) == [Example(example.prompt[:2] + (1, 3), (), 0)]


def test_a_truncated_response_has_no_end_token(toy: Tokenizer):
    for words, ends in ((2, True), (3, True), (4, False), (5, False)):
        (example,) = make(toy, [Row("one", "", ("cat " * words,))])
        assert (toy.eos_id in example.response) is ends
        assert len(example.response) == min(words + ends, 4)


def test_prompt_and_response_are_cut_together(toy: Tokenizer):
    row = Row("one", "", ("cat " * 6,))
    for total, length in ((7, 3), (8, 4), (11, 7), (12, 7)):
        (example,) = make(toy, [row], max_response=9, max_tokens=total)
        assert (len(example.prompt), len(example.response)) == (4, length)
        assert (toy.eos_id in example.response) is (length == 7)


def test_an_over_long_prompt_is_refused_or_dropped(toy: Tokenizer):
    with pytest.raises(InputError, match=r"f:2: a prompt of 33 .* 8 \(1 of 2 .*data\.max_prompt"):
        make(toy, [SHORT, LONG])
    kept = make(toy, [LONG, SHORT], long_prompts="drop")
    assert [(e.row, e.response) for e in kept] == [(1, (*toy.encode("red cat"), toy.eos_id))]
    with pytest.raises(InputError, match="no prompt is within 8 tokens"):
        make(toy, [LONG], long_prompts="drop")
    with pytest.raises(ValueError, match="choose error or drop"):
        make(toy, [SHORT], long_prompts="cut")


def test_empty_rows_are_refused(toy: Tokenizer):
    with pytest.raises(InputError, match="row 1: no output"):
        make(toy, [SHORT, Row("one")])
    with pytest.raises(InputError, match="row 0: the output has no tokens"):
        make(toy, [Row("one", "", (" ",))])
    with pytest.raises(InputError, match="no rows"):
        make(toy, [])


ids = st.lists(st.integers(0, 63), max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), max_size=4), st.integers(5, 7), st.integers(5, 7))
def test_padding_keeps_every_token_in_its_place(pairs, prompt_slots: int, response_slots: int):
    examples = [Example(*pair) for pair in pairs]
    batch = pad(examples, prompt_slots, response_slots, pad_id=99)
    assert batch.prompt.shape == batch.prompt_mask.shape == (len(pairs), prompt_slots)
    assert batch.response.shape == batch.response_mask.shape == (len(pairs), response_slots)
    assert batch.prompt.dtype == batch.response.dtype == np.int32
    assert batch.prompt_mask.dtype == batch.response_mask.dtype == bool
    for b, (prompt, response) in enumerate(pairs):
        missing = prompt_slots - len(prompt)
        assert batch.prompt[b].tolist() == [99] * missing + list(prompt)
        assert batch.prompt_mask[b].tolist() == [False] * missing + [True] * len(prompt)
        missing = response_slots - len(response)
        assert batch.response[b].tolist() == list(response) + [99] * missing
        assert batch.response_mask[b].tolist() == [True] * len(response) + [False] * missing


def test_padding_refuses_what_does_not_fit():
    for example in (Example((1, 2, 3), (1,), 7), Example((1,), (1, 2, 3), 7)):
        with pytest.raises(InputError, match="row 7: .* in 2 and 2 slots; raise config.data"):
            pad([example], 2, 2, 0)
