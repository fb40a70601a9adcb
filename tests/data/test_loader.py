"""The order of batches: random access, epochs, processes, and the ordered pass."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.data.examples import Example
from minillm_jax.data.loader import Batches, batches, digest, ordered
from minillm_jax.types import InputError

SLOTS = {"prompt_slots": 3, "response_slots": 2, "pad_id": 0}


def examples(count: int) -> list[Example]:
    return [Example((i + 1, i + 1), (i + 1,), i) for i in range(count)]


def rows(stream: Batches, *indices: int) -> list[int]:
    return [example.row for i in indices for example in stream.examples(i)]


def test_every_epoch_holds_every_example_once_in_a_new_order():
    stream = batches(examples(10), 4, seed=1, **SLOTS)  # 10 examples: an epoch is 2.5 batches
    order = rows(stream, *range(5))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] and order[:10] != list(range(10))
    assert stream.epoch_length == 3
    assert batches(examples(8), 4, seed=1, **SLOTS).epoch_length == 2


def test_a_batch_depends_on_its_index_alone():
    stream, again = (batches(examples(10), 4, seed=5, **SLOTS) for _ in range(2))
    straight = [rows(stream, i) for i in range(6)]
    assert [rows(again, i) for i in reversed(range(6))] == straight[::-1]
    assert rows(stream, 10**9) == rows(again, 10**9)
    with pytest.raises(IndexError):
        stream[-1]


def test_seeds_give_unrelated_orders():
    """With a plain seed + epoch, the second epoch of seed 1 would be the first of seed 2."""
    one, two = (batches(examples(8), 8, seed=seed, **SLOTS) for seed in (1, 2))
    assert rows(one, 0) != rows(two, 0)
    assert rows(one, 1) != rows(two, 0)


def test_a_batch_larger_than_the_data_is_filled():
    assert Counter(rows(batches(examples(3), 6, seed=0, **SLOTS), 0)) == {0: 2, 1: 2, 2: 2}


def test_batches_are_padded_sequences():
    stream = batches(examples(10), 4, seed=1, **SLOTS)
    batch = stream[3]
    token = np.array([row + 1 for row in rows(stream, 3)])
    assert (batch.prompt == np.stack([0 * token, token, token], axis=1)).all()
    assert batch.prompt_mask.tolist() == [[False, True, True]] * 4
    assert (batch.response == np.stack([token, 0 * token], axis=1)).all()
    assert batch.response_mask.tolist() == [[True, False]] * 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 12))
def test_the_ordered_pass_sees_every_example_once(count: int, size: int):
    seen = []
    for batch, real in ordered(examples(count), size, **SLOTS):
        assert batch.prompt.shape == (size, 3)
        seen += batch.response[:real, 0].tolist()
        assert batch.response_mask[:real, 0].all()
        assert not batch.response_mask[real:].any()
        assert batch.prompt_mask.tolist() == [[False, True, True]] * size
    assert seen == list(range(1, count + 1))


def test_a_digest_tells_other_examples():
    """Whose ids are others, in another order, or divided otherwise into prompt and response."""
    one, two = Example((1, 2), (3,)), Example((4,), ())
    wholes = [[one, two], [two, one], [one], [Example((1, 2, 3), ()), two]]
    wholes += [[Example((1,), (2, 3)), two], [one, Example((), (4,))], []]
    assert len({digest(whole) for whole in wholes}) == len(wholes)
    assert digest([one, two]) == digest((one, two)) < 2**31


def test_what_cannot_be_loaded_is_refused():
    for make in (
        lambda data, size: batches(data, size, 0, **SLOTS),
        lambda data, size: next(ordered(data, size, **SLOTS)),
    ):
        with pytest.raises(InputError, match="no examples"):
            make([], 2)
        with pytest.raises(InputError, match="batch size 0"):
            make(examples(4), 0)
