"""What a judge is asked and what its scores come to, by hand."""

import math

import pytest

from minillm_jax.evaluation import judging
from minillm_jax.evaluation.judging import Item
from minillm_jax.types import InputError


def row(model="sft", response="mine", seed=0, **changes):
    base = {
        "test": "dolly", "model": model, "seed": seed, "row": 3, "instruction": "Do it.",
        "input": "this", "references": ["gold", "other gold"], "response": response,
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize(
    ("reply", "count", "found"),
    [
        ("8 6\nThe first has 2 more facts.", 2, [8, 6]),
        ("\n**7.5, 10**", 2, [7.5, 10]),
        ("Scores below.\n3 4", 2, [3, 4]),
        ("9", 1, [9]),
        ("8 6", 1, None),
        ("11 5", 2, None),
        ("-3 5", 2, None),
        ("0 5", 2, None),
        ("8/10 6/10", 2, [8, 6]),
        ("| 8 | 6 |", 2, [8, 6]),
        ("8.", 1, [8]),
        ("8/10\n6/10", 2, None),  # not 8 and 10
        ("1: 8\n2: 6", 2, None),
        ("1) 8\n2) 6", 2, None),
        ("8/5", 1, None),
        ("Answer 1: 8 and 6", 2, None),
        ("", 2, None),
    ],
)
def test_scores_are_a_line_of_numbers(reply, count, found):
    assert judging.scores(reply, count) == found


def test_a_pair_is_asked_in_both_orders_and_averaged():
    (item,) = judging.items([row()], "reference")
    first, second = item.questions
    assert first.index("mine") < first.index("gold") and second.index("gold") < second.index("mine")
    assert "Do it.\n\nthis" in first and "other gold" not in first
    # As first it gets 8 against 6, as second 5 against 7.
    assert judging.verdict(item, ["8 6", "7 5"]) == {
        "score": 6.5, "other_score": 6.5, "outcome": "tie", "first": 2.0,
    }  # fmt: skip
    for replies, outcome in ((["8 6", "6 7"], "win"), (["3 6", "6 7"], "loss")):
        said = judging.verdict(item, replies)
        assert said and said["outcome"] == outcome
    assert judging.verdict(item, ["8 6", "well"]) is None


def test_pairwise_is_against_the_same_prompt_and_seed_of_the_baseline():
    rows = [row(), row(seed=1), row("minillm", "better"), row("minillm", "", seed=1)]
    found = judging.items(rows, "pairwise", "sft")
    assert [(i.model, i.seed, i.answer, i.other) for i in found] == [
        ("minillm", 0, "better", "mine"),
        ("minillm", 1, "(empty)", "mine"),
    ]
    with pytest.raises(InputError, match="sft has no answer to row 3 of dolly with seed 1: judge"):
        judging.items([*rows[:1], *rows[2:]], "pairwise", "sft")
    (pair,) = judging.items([row(response=""), row("minillm", "better")], "pairwise", "sft")
    assert pair.other == "(empty)" and len(pair.questions) == 2
    (alone, *_) = judging.items(rows, "single")
    assert len(alone.questions) == 1 and judging.verdict(alone, ["7"]) == {"score": 7}


def test_the_ratio_is_that_of_the_sums_and_deviates_over_seeds():
    def said(seed, score, other):
        item = Item("dolly", "sft", seed, 0, "", "a", "b")
        outcome = "win" if score > other else "loss"
        return item, {"score": score, "other_score": other, "outcome": outcome, "first": 1.0}

    judged = [said(0, 2, 4), said(0, 8, 6), said(1, 3, 4), (said(1, 1, 1)[0], None)]
    found = judging.figures(judged)["dolly"]["sft"]
    assert (found["judged"], found["unparsed"]) == (3, 1)
    assert found["ratio"] == pytest.approx((1.0 + 0.75) / 2)  # 10 / 10, not the mean of ratios
    assert found["ratio_deviation"] == pytest.approx(0.25 / math.sqrt(2))
    assert found["wins"] == 0.25 and found["score"] == 4.0
    nothing = judging.figures([(judged[0][0], None)])["dolly"]["sft"]
    assert nothing == {"judged": 0, "unparsed": 1}
