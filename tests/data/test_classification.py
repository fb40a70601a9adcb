import json

import pytest

from minillm_jax.data import classification
from minillm_jax.types import InputError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sst2_and_boolq_as_instructions(tmp_path):
    file = write(
        tmp_path / "a", {"sentence": "so good . ", "label": 1}, {"sentence": "x", "label": 0}
    )
    rows, labels = classification.read("sst2", file)
    assert labels == [1, 0] and rows[0].input == "so good ."
    assert "positive or negative" in rows[0].instruction and rows[1].where.endswith("a:2")
    assert classification.TASKS["sst2"].labels[labels[0]] == "positive"
    file = write(tmp_path / "b", {"question": "is it red?", "passage": "It is.", "answer": False})
    rows, labels = classification.read("boolq", file)
    assert "is it red? Please respond as yes or no" in rows[0].instruction
    assert rows[0].input == "It is." and classification.TASKS["boolq"].labels[labels[0]] == "no"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"sentence": "x", "label": -1}, "label -1 is none"),  # as in the test set
        ({"sentence": "x", "label": 2}, "not a labelled row of sst2"),
        ({"sentence": "x"}, "not a labelled row of sst2"),
        (["x"], "not a labelled row of sst2"),
    ],
)
def test_a_row_without_its_fields_is_named(tmp_path, row, says):
    with pytest.raises(InputError, match=f"a:1: {says}"):
        classification.read("sst2", write(tmp_path / "a", row))


def test_other_data_and_no_rows(tmp_path):
    with pytest.raises(InputError, match="no calibration data 'mnli': choose from sst2, boolq"):
        classification.read("mnli", "x")
    with pytest.raises(InputError, match="no rows"):
        classification.read("sst2", write(tmp_path / "a"))


def test_the_real_sets_are_read(shared):
    for name, rows in (("sst2", 872), ("boolq", 3270)):
        found, labels = classification.read(
            name, str(shared / "data" / name / "validation.jsonl.gz")
        )
        assert len(found) == len(labels) == rows and set(labels) == {0, 1}
