"""Reading rows: what is accepted, and one line with place and cure for what is not."""

import gzip
import json
from pathlib import Path

import pytest

from minillm_jax.data.sources import Row, packaged_prompts, read_jsonl
from minillm_jax.types import InputError


def test_forms_that_are_accepted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        b'{"instruction": "a\\u2028b", "output": "x", "prompt": 3}\r\n'
        b'{"instruction": "c", "input": "", "output": ["y", "z"]}\r\n'
        b'{"instruction": "d", "context": "e", "response": "f"}\n'
        b'{"instruction": "g", "input": null, "output": "h"}\n'
        b"   \n"
    )
    expected = [
        Row("a\u2028b", "", ("x",), f"{path}:1"),
        Row("c", "", ("y", "z"), f"{path}:2"),
        Row("d", "e", ("f",), f"{path}:3"),
        Row("g", "", ("h",), f"{path}:4"),
    ]
    assert read_jsonl(path, need_output=True) == expected
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.output for row in read_jsonl(packed)] == [row.output for row in expected]


def test_output_may_be_absent_unless_it_is_needed(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "a"}')
    assert read_jsonl(path) == [Row("a", where=f"{path}:1")]
    with pytest.raises(InputError, match=r"prompts.jsonl:1: output is missing or empty; fill"):
        read_jsonl(path, need_output=True)


GOOD = b'{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"output": "b"}', "instruction is missing or empty"),
        (b'{"instruction": "a", "output": []}', "output is missing or empty"),
        (b'{"instruction": "a", "output": ["b", ""]}', r"output\[1\] is missing or empty"),
        (b'{"instruction": "a", "response": {}}', "response is an object, not a string"),
        (b'{"instruction": "a", "output": {"a": 1, "a": 2}}', "a is given twice"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: bytes, words: str):
    """`test_bad_input` has more."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{words}") as error:
        read_jsonl(path)
    assert ";" in str(error.value) and "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    whole = gzip.compress(GOOD * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD)
    for name, words in (
        ("none.jsonl", "no such file"),
        (".", "cannot be read"),
        ("empty.jsonl", "no rows"),
        ("cut.jsonl.gz", "cannot be read"),
        ("plain.jsonl.gz", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            read_jsonl(tmp_path / name)


def test_the_real_sets_are_read(shared: Path):
    counts = {"dolly/train.jsonl.gz": 13420, "dolly/dev.jsonl": 1000, "eval/dolly.jsonl": 500}
    for name, count in {**counts, "eval/self_inst.jsonl": 242, "eval/vicuna.jsonl": 80}.items():
        assert len(read_jsonl(shared / "data" / name, need_output=True)) == count
    rows = read_jsonl(shared / "data/dolly/train.jsonl.gz")
    assert sum(bool(row.input) for row in rows) == 13420 - 9258


def test_packaged_prompts_are_disjoint():
    splits = {name: packaged_prompts(name) for name in ("train", "validation", "test")}
    pairs = [(row.instruction, row.input) for rows in splits.values() for row in rows]
    assert len(pairs) == len(set(pairs)) > 500
    assert all(len(rows) >= 50 for rows in splits.values())
    with pytest.raises(InputError, match="no packaged prompts 'dev'"):
        packaged_prompts("dev")


def test_packaged_prompts_ship_their_fields():
    from importlib.resources import files

    text = (files("minillm_jax.data") / "prompts" / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(r["instruction"], r["input"]) for r in rows] == [
        (r.instruction, r.input) for r in packaged_prompts("test")
    ]
