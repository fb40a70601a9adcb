import pytest

from minillm_jax.evaluation.lengths import by_length


def test_buckets_are_those_of_the_paper_by_words_of_the_first_reference():
    references = [[" ".join("w" * n)] for n in (0, 5, 6, 10, 11, 400)]
    references[0].append("a longer one that does not decide the bucket of its row")
    scores = {"rouge_l": [0.0, 0.5, 0.2, 0.4, 0.6, 1.0], "exact_match": [1.0, 0, 0, 0, 1.0, 0]}
    assert by_length(scores, references) == {
        "0-5": {"count": 2, "rouge_l": 0.25, "exact_match": 0.5},
        "6-10": {"count": 2, "rouge_l": pytest.approx(0.3), "exact_match": 0.0},
        "11-": {"count": 2, "rouge_l": 0.8, "exact_match": 0.5},
    }


def test_a_bucket_without_answers_is_left_out():
    assert list(by_length({"rouge_l": [1.0]}, [["one two three four five six"]])) == ["6-10"]
