import errno
import json
import math
import os
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.reporting import writers
from minillm_jax.reporting.writers import MetricsWriter, read_rows, write_json
from minillm_jax.types import InputError


def _strict(text: str) -> dict:
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_are_on_disk_at_once_and_strict(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("distill", 3, 1.5, {"loss": math.nan, "kl": jnp.float32(0.5), "n": [np.inf]})
        text = (tmp_path / "metrics.jsonl").read_text()
        times = (tmp_path / "timing.jsonl").read_text()
    expected = {"stage": "distill", "step": 3, "loss": None, "kl": 0.5, "n": [None]}
    assert _strict(text) == expected
    assert _strict(times) == {"stage": "distill", "step": 3, "seconds": 1.5}
    assert text.endswith("\n")


def test_a_metric_may_not_hide_the_place_of_its_row(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="step"):
        writer.write("distill", 3, 1.5, {"step": 4})


def test_resume_leaves_no_row_twice(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for stage, steps in (("sft", 4), ("distill", 6)):
            for step in range(1, steps + 1):
                writer.write(stage, step, step, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.truncate("distill", 3, step=3)
        assert len(read_rows(writer.path)) == 7
        for step in range(4, 7):
            writer.write("distill", step, step, {"loss": 2.0})
    for file in ("metrics.jsonl", "timing.jsonl"):
        rows = [(row["stage"], row["step"]) for row in read_rows(tmp_path / file)]
        assert rows == [("sft", s) for s in range(1, 5)] + [("distill", s) for s in range(1, 7)]


@pytest.mark.parametrize("torn", ['{"stage": "sft", "st', '{"stage": "sft", "st\n', "17\n", "\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n' + torn)
    assert [row["step"] for row in read_rows(path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 2, 0, {})
    assert [_strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(tmp_path) as writer:
        writer.write("sft", 3, 0, {})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not a JSON object"):
        read_rows(path)


def test_write_json_is_strict_and_readable(tmp_path):
    value = {"nan": math.nan, "array": np.array([1.0, np.inf]), "path": tmp_path, "text": "é\ud800"}
    write_json(tmp_path / "new" / "a.json", value)
    raw = (tmp_path / "new" / "a.json").read_bytes()
    assert _strict(raw.decode()) == value | {"nan": None, "array": [1, None], "path": str(tmp_path)}
    assert "é".encode() in raw  # not é


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writers.os, step, full)
    with pytest.raises(InputError, match="cannot write .*a.json: No space left on device; free"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_read_json_refuses_what_is_no_object(tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"a\.json"):
            writers.read_json(tmp_path / "a.json")


def test_missing_tensorboard_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match="pip install tensorboardX"):
        MetricsWriter(tmp_path, tensorboard=True)
    MetricsWriter(tmp_path).close()


def _records(folder: Path) -> list[bytes]:
    """The payloads of TensorBoard's event files: length, its checksum, payload, its checksum."""
    records = []
    for path in sorted(folder.rglob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            records.append(data[12 : 12 + size])
            data = data[16 + size :]
    return records


def test_tensorboard_gets_the_scalars_of_a_stage(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is an optional package")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write("distill", 1, 0.5, {"reverse_kl": 0.25, "loss": math.nan})
        writer.truncate("distill", 0)
        writer.write("distill", 1, 0.5, {"reverse_kl": 0.75})
    records = _records(tmp_path / "tensorboard" / "distill")
    found = [r for r in records if b"reverse_kl" in r]
    assert [struct.pack("<f", x) in r for x, r in zip((0.25, 0.75), found, strict=True)] == [
        True
    ] * 2
    assert not any(b"loss" in r or b"seconds" in r for r in records)
