import math

import pytest

from minillm_jax.evaluation import text


def test_words_split_at_any_white_space():
    assert text.words("  One, two\n\nthree ") == ["One,", "two", "three"]


def test_distinct_n_counts_over_the_whole_set():
    # Bigrams ab bc | bc cd: three distinct of four.
    assert text.distinct_n(["abc", "bcd"], n=2) == 0.75
    assert text.distinct_n([[1, 2, 3, 4, 5]]) == 1.0
    assert math.isnan(text.distinct_n([[1, 2, 3]], n=4))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),  # too short for a 4-gram
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # five 4-grams, the last is the first
        ([7] * 8, 0.8),  # five 4-grams, four of them repeats
    ],
)
def test_repetition_by_hand(answer, expected):
    assert text.repetition(answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("it is blue and far away", False),
        ("that is funny ha ha ha", False),  # three words are an ending, not a loop
        ("that is funny ha ha ha ha", True),
        ("well go on go on go on", True),
        ("well go on go on", False),  # twice is not a loop
        ("well on go on go on go on", True),  # the same, begun in the middle of the span
        ("a b c x y z x y z x y z", True),
        ("a b c x y z x y z x y", False),  # 2 2/3 spans, and repetition 2/8
        ("a b c d e a b c d e a b c d f", True),  # no loop at its end; repetition 6/12
    ],
)
def test_loops(answer, expected):
    assert text.loops(text.words(answer)) is expected


def test_describe_is_a_mean_per_answer():
    figures = text.describe([[1, 2, 3, 4], [7] * 8])
    assert figures == {
        "length": 6.0,
        "distinct_4": pytest.approx(2 / 6),
        "repetition": pytest.approx(0.4),
        "loops": 0.5,
    }
    assert all(math.isnan(value) for value in text.describe([]).values())
