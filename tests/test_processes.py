"""Whole runs as several processes: the answers and losses of one, whoever goes on after a kill."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from minillm_jax.models import hf
from tests.compiling import xla_flags
from tests.gcs_server import Server
from tests.toy_run import write_config

ROOT = Path(__file__).parents[1]
DEVICES = 4
# What is compiled here runs for milliseconds, and twice or more by processes of one number.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

# Four processes of one device each: both axes of the models lie across them.
SPLIT = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
TRAIN = "--stages=teacher_answers,student_sft,distill"  # the evaluation of one process is `alone`'s

# Before anything else in a process: it ends if it asks for another host.
LOOPBACK_ONLY = """
import os, sys
def stay(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0]
        if host not in (None, "", "localhost", "127.0.0.1", "::1", 0, 47):
            os.write(2, f"asked for {args}".encode())
            os._exit(99)
sys.addaudithook(stay)
"""


def start(folder, workdir, processes, *flags, devices=DEVICES, **environ):
    """Start the toy experiment on so many devices as so many processes."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    base = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    base |= {"XLA_FLAGS": xla_flags(devices // processes)}
    base |= QUICK | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.killed_run"]
    command += ["--config", str(folder / "toy.py"), "--workdir", str(workdir), *flags]
    started = []
    for rank in range(processes):
        place = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(rank),
        }
        environment = base | (place if processes > 1 else {}) | environ
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def run(folder, workdir, processes, *flags, **options):
    """Run the toy experiment to its end; exit code, output and errors by rank."""
    started = start(folder, workdir, processes, *flags, **options)
    ended = [process.communicate(timeout=600) for process in started]
    return [(p.returncode, *texts) for p, texts in zip(started, ended, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process with all four devices."""
    workdir = folder / "alone"
    ((code, _, error),) = run(folder, workdir, 1)
    assert code == 0, error
    return workdir


def judged(workdir):
    """The answers of the evaluation, and apart from them log(p/q) of every sampled token."""
    lines = (workdir / "evaluate" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    samples = [one for row in rows for one in row["samples"].values()]
    return rows, [x for one in samples for x in one.pop("log_ratio", [])]


def same(workdir, alone):
    """Assert equal answers, metrics to 1e-5, and equal students to 1e-5."""
    file = "stages/teacher_answers/answers.jsonl"
    assert (workdir / file).read_bytes() == (alone / file).read_bytes()
    if (workdir / "evaluate").exists():
        (mine, ratios), (theirs, wanted) = (judged(at) for at in (workdir, alone))
        assert mine == theirs
        np.testing.assert_allclose(ratios, wanted, 0, 1.1e-3)  # written with three digits
    found, expected = (
        [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
        for at in (workdir, alone)
    )
    assert len(found) == len(expected) > 10
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys():
            if isinstance(row[name], str):
                assert row[name] == wanted[name]
            else:
                close = abs(row[name] - wanted[name]) <= 1e-5 * max(1, abs(wanted[name]))
                assert close, (row["stage"], row["step"], name, row[name], wanted[name])
    for stage in ("student_sft", "distill"):
        models = [hf.load(at / "stages" / stage / "model").params for at in (workdir, alone)]
        for path in ("up", "down"):
            a, b = (np.asarray(p["layers"]["mlp"][path]["kernel"]) for p in models)
            np.testing.assert_allclose(a, b, 0, 1e-5)


@pytest.mark.parametrize(("processes", "flags"), [(2, ()), (4, SPLIT)])
def test_processes_train_like_one_and_write_once(processes, flags, folder, alone):
    workdir = folder / f"as-{processes}"
    for rank, (code, out, error) in enumerate(run(folder, workdir, processes, *flags)):
        assert code == 0, error
        assert ("distill" in error) == ("Reverse KL" in out) == (rank == 0)
    assert (workdir / "evaluate").exists()
    same(workdir, alone)


def test_two_are_killed_and_four_go_on_and_then_one(folder, alone):
    workdir = folder / "killed"
    ended = run(folder, workdir, 2, KILL_AT="student_sft/2")
    assert [code for code, *_ in ended] == [-signal.SIGKILL] * 2
    ended = run(folder, workdir, 4, *SPLIT, KILL_AT="distill/2")
    assert [code for code, *_ in ended] == [-signal.SIGKILL] * 4
    assert "teacher_answers: done" in ended[0][2] and "student_sft: done" not in ended[0][2]
    ((code, _, error),) = run(folder, workdir, 1, "--config.mesh.tensor=2", TRAIN)
    assert code == 0 and "student_sft: done" in error, error
    same(workdir, alone)


def test_eight_devices_are_killed_and_two_go_on_and_then_four(folder, alone):
    """A checkpoint of one mesh goes on on another, of more devices or of fewer."""
    workdir = folder / "shrunk"
    eight = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    ((code, *_),) = run(folder, workdir, 1, *eight, devices=8, KILL_AT="student_sft/2")
    assert code == -signal.SIGKILL
    assert (workdir / "stages" / "student_sft" / "checkpoints" / "2").is_dir()
    ((code, _, error),) = run(
        folder, workdir, 1, "--config.mesh.fsdp=2", devices=2, KILL_AT="distill/2"
    )
    assert code == -signal.SIGKILL and "teacher_answers: done" in error, error
    assert (workdir / "stages" / "distill" / "checkpoints" / "2").is_dir()
    ((code, _, error),) = run(folder, workdir, 1, TRAIN, devices=4)
    assert code == 0 and "student_sft: done" in error, error
    same(workdir, alone)


def test_one_of_two_is_told_to_end_and_then_one_dies_and_one_goes_on(folder, alone):
    workdir = folder / "told"
    first, second = run(folder, workdir, 2, TERM_AT="student_sft/2", RANK="1")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "stopped: student_sft, saved after update 2 of 4; the same command" in first[2]
    assert "stopped" not in second[2]
    left, dead = start(folder, workdir, 2, KILL_AT="distill/2", RANK="1")
    dead.communicate(timeout=600)
    assert dead.returncode == -signal.SIGKILL
    left.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, error = left.communicate(timeout=60)
    assert time.monotonic() - began < 20
    # It may have noticed by itself before SIGTERM came: a line, too, with another code.
    assert left.returncode in (0, 2) and "the same command goes on" in error, error
    assert "Traceback" not in error
    ((code, _, error),) = run(folder, workdir, 1, TRAIN)
    assert code == 0 and "student_sft: done" in error, error
    same(workdir, alone)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs pip install gcsfs")
def test_two_with_a_disk_each_are_killed_and_one_goes_on_from_their_bucket(folder, alone, tmp_path):
    url, disks = "gs://bucket/lost/run", [tmp_path / "first", tmp_path / "second"]
    (tmp_path / "sitecustomize.py").write_text(LOOPBACK_ONLY)
    with Server() as storage:
        there = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"} | storage.environ()
        lost = there | {"MINILLM_CACHE": str(disks[0]), "KILL_AT": "distill/2"}
        ended = run(folder, url, 2, **lost)
        assert [code for code, *_ in ended] == [-signal.SIGKILL] * 2, ended[0][2] + ended[1][2]
        images = disks[0] / "runs" / quote("bucket/lost/run", safe="")
        assert sorted(path.name for path in images.iterdir()) == ["0", "1"]
        assert not list(images.rglob("checkpoints"))
        names = storage.names("lost/run/")
        assert {"lost/run/lock", "lost/run/stages/distill/model/config.json"} < set(names)
        assert "lost/run/stages/distill/checkpoints/2/commit_success.txt" in names
        ((code, _, error),) = run(folder, url, 1, **there, MINILLM_CACHE=str(disks[1]))
        assert code == 0 and "student_sft: done" in error, error
        assert f"report: {url}/report.html" in error
        for name in storage.names("lost/run/"):
            path = tmp_path / "copy" / name.removeprefix("lost/run/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.objects[name][0])
    same(tmp_path / "copy", alone)
    assert (tmp_path / "copy" / "report.html").exists()
    assert not (tmp_path / "copy" / "lock").exists()
