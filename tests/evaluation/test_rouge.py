import math
import sys

import pytest

from minillm_jax.evaluation import rouge
from minillm_jax.types import InputError


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat on the mat", 5 words of 6 and of 7: F1 = 10 / 13.
    answer, reference = "the cat sat on the mat", "the black cat lay on the mat"
    assert rouge.rouge_l(answer, reference) == pytest.approx(10 / 13)


def test_rouge_l_stems_words():
    assert rouge.rouge_l("He was jumping", "he was jumps") == 1.0


def test_rouge_l_takes_the_best_reference():
    references = ["nothing in common", "the cat sat"]
    assert rouge.rouge_l("the cat sat", references) == 1.0
    assert rouge.rouge_l("the cat sat", references[::-1]) == 1.0
    assert rouge.rouge_l("the cat sat", references[:1]) == 0.0


def test_rouge_l_of_an_empty_answer_is_zero():
    assert rouge.rouge_l("", "the cat") == 0.0


def test_rouge_l_without_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        rouge.rouge_l("the cat", [])


def test_mean_rouge_l():
    assert rouge.mean_rouge_l(["a b", "c d"], ["a b", ["x", "y"]]) == 0.5
    assert math.isnan(rouge.mean_rouge_l([], []))
    with pytest.raises(ValueError):
        rouge.mean_rouge_l(["a"], ["a", "b"])


def test_missing_package_is_named_with_its_cure(monkeypatch):
    rouge._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match="pip install rouge-score"):
        rouge.rouge_l("a", "a")


def test_self_rouge_l_of_pairs_within_groups():
    # Of the first group "a b" and "a c" share one word of two; of the second all.
    assert rouge.self_rouge_l([["a b", "a c"]]) == 0.5
    assert rouge.self_rouge_l([["a b", "a c"], ["x", "x"]]) == 0.75
    assert math.isnan(rouge.self_rouge_l([["alone"]]))


def test_self_rouge_l_of_a_large_group_looks_at_the_next_ones():
    answers = ["a", "a", "b", "b"]
    assert rouge.self_rouge_l([answers], others=1) == 0.5  # a a, a b, b b, b a
    assert rouge.self_rouge_l([answers]) == pytest.approx(1 / 3)  # all twelve ordered pairs
