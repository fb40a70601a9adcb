import pytest

from minillm_jax.evaluation.exact import exact_match, normalised


def test_case_punctuation_and_spaces_do_not_count_but_articles_do():
    assert normalised(" The  U.S.,\n'again'! ") == "the us again"
    assert exact_match("Paris.", "paris") == 1.0
    assert exact_match("the answer", "answer") == 0.0


def test_one_of_several_references_is_enough():
    assert exact_match("two", ["one", "Two!"]) == 1.0
    assert exact_match("three", ["one", "Two!"]) == 0.0
    with pytest.raises(ValueError, match="reference"):
        exact_match("three", [])
