"""The paper's split: what is dropped, what is held out, and its sizes on the real rows."""

from pathlib import Path

import pytest

from minillm_jax.data.sources import Row, read_jsonl
from minillm_jax.data.splits import SIZES, paper_split, prompt_lengths
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.types import InputError

FEW = {"train": 0, "validation": 2, "test": 1}


def rows(*names: str) -> list[Row]:
    return [Row(name, "", ("answer",)) for name in names]


def names(part: list[Row]) -> str:
    return " ".join(row.instruction for row in part)


def test_given_sets_are_kept_and_held_out_of_training():
    given = [*rows("a", "b", "c"), Row("d", "x  y"), Row("d", "z"), *rows("e", "b")]
    test, validation = [Row("d", "x\ny")], [Row("  b ")]
    found = paper_split(given, [1] * 7, test=test, validation=validation, sizes=FEW)
    assert found.test == test and found.validation == validation
    assert names(found.train) == "a c d e" and found.train[2].input == "z"


def test_sets_that_are_not_given_are_the_first_rows():
    """Rows with the prompt of one of them go nowhere else, and over-long prompts nowhere."""
    given, lengths = rows(*"abcbadaef"), [9, 1, 1, 1, 1, 256, 1, 257, 1]
    found = paper_split(given, lengths, max_prompt=256, sizes=FEW)
    assert [names(p) for p in (found.test, found.validation, found.train)] == ["a", "b c", "d f"]
    found = paper_split(given, lengths, max_prompt=8, sizes=FEW, test=rows("c"))
    assert [names(p) for p in (found.test, found.validation, found.train)] == ["c", "b a", "f"]


def test_no_rows_to_train_on_are_refused():
    with pytest.raises(InputError, match="of 3 rows none is left .* 1 and 2 rows go to .*; give"):
        paper_split(rows(*"abc"), [1] * 3, sizes=FEW)
    with pytest.raises(ValueError, match="zip"):
        paper_split(rows("a"), [], sizes=FEW)


def test_the_real_rows_have_the_sizes_of_the_paper(shared: Path):
    """The public set less 91 rows."""
    data = shared / "data"
    gpt2 = load_tokenizer(shared / "tokenizers/gpt2")
    train = read_jsonl(data / "dolly/train.jsonl.gz", need_output=True)
    validation = read_jsonl(data / "dolly/dev.jsonl", need_output=True)
    test = read_jsonl(data / "eval/dolly.jsonl", need_output=True)
    public = [*test, *train, *validation]
    lengths = prompt_lengths(gpt2, "alpaca", public)
    found = paper_split(public, lengths, validation=validation, test=test)
    assert (found.test, found.validation) == (test, validation)
    assert len(found.train) == 11_429 and abs(len(found.train) - SIZES["train"]) < 10

    alone = paper_split(public, lengths)
    assert len(alone.test) == 500 and len(alone.validation) == 1000
    assert len(alone.train) == 11_395  # the first rows are not those of the paper
