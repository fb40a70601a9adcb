"""Exponents and their verdict, and what simulated devices send each other."""

import argparse
import sys

import pytest

from benchmarks import scaling, weak_scaling
from minillm_jax.reporting.writers import read_json


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Run `scaling` and return the JSON that it writes."""

    def run(*options: str) -> dict:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["scaling", f"--json={path}", "--devices=", *options])
        scaling.main()
        return read_json(path)

    return run


def test_a_step_at_two_sizes(figures, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "AXES", {"batch": (1, 2)})
    base = scaling.Size(batch=1, response=4, vocabulary=64, prompt=2)
    monkeypatch.setattr(scaling, "BASE", base)
    plot = tmp_path / "plot.png"
    found = figures("--width=16", "--repeats=1", f"--plot={plot}")
    for one in found["axes"]["batch"].values():
        assert one["flops"][1] == 2 * one["flops"][0] and one["work_exponent"] == pytest.approx(1)
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0
    head, student = 2 * 4 * 16 * 64, 2 * 2 * (3 * 16 * 48 + 2 * 16 * 16 + 2 * 16 * 8)
    scores = 2 * 2 * 2 * 16 * 6 / 2
    assert found["axes"]["batch"]["update"]["flops"][0] == pytest.approx(
        3 * (6 * (student + scores) + head) + head
    )
    assert plot.stat().st_size > 1000
    assert "faster than its work grows" in capsys.readouterr().out


@pytest.mark.parametrize(("power", "named"), [(1.0, []), (1.5, ["update with batch"])])
def test_verdict(power, named, figures, monkeypatch, capsys):
    def measured(axis, values, base, repeats):
        steeper = power if axis == "batch" else 1.0
        powers = {"collection": 1.0, "update": steeper}
        return {
            phase: {
                "seconds": [],
                "time_exponent": scaling.exponent(values, [3.0 * v**p for v in values]),
                "work_exponent": 1.0,
            }
            for phase, p in powers.items()
        }

    monkeypatch.setattr(scaling, "measure", measured)
    assert figures()["faster"] == named
    assert f"grows: {', '.join(named) or 'nothing'}\n" in capsys.readouterr().out


def test_devices_send_as_much_each(monkeypatch, capsys):
    monkeypatch.setattr(weak_scaling, "MESHES", {"data": weak_scaling.MESHES["data"]})
    monkeypatch.setattr(weak_scaling, "PROGRAMS", ("distill update",))
    asked = argparse.Namespace(devices="2,4", argument="tiny", chip="h100", rows=1)
    found = weak_scaling.counted(asked)
    weak_scaling.show(found)
    assert [one["devices"] for one in found] == [2, 4]
    few, many = (one["collectives"]["all-reduce"] for one in found)
    # Once or twice the gradient of the embedding: the compiler reduces its parts apart or together.
    assert few == pytest.approx(many, rel=0.2) and few > 1e5
    assert found[0]["efficiency"] == 1 and 0 < found[1]["efficiency"] < 1
    assert capsys.readouterr().out.count("distill update") == 2
