"""SIGTERM: what hears it, who agrees, and what happens where no safe point comes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minillm_jax import hosts, program, stopping
from minillm_jax.main import FLAGS
from minillm_jax.types import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def asked(monkeypatch):
    """A request of its own for each test."""
    monkeypatch.setattr(stopping, "_asked", threading.Event())
    return stopping.ask


def test_a_safe_point_stops_only_who_was_asked(asked):
    stopping.check("nothing yet")
    asked()
    with pytest.raises(stopping.Stopped, match="row 3"):
        stopping.check("row 3")


def test_one_process_that_was_asked_stops_all(asked, monkeypatch):
    monkeypatch.setattr(hosts, "agree", lambda ok: False)  # another one was
    with pytest.raises(stopping.Stopped):
        stopping.check()


def test_a_stop_is_a_line_and_the_code_that_launchers_ask_for(monkeypatch, capsys):
    def main(_):
        raise stopping.Stopped("distill, saved after update 3 of 8")

    assert program.call(main, FLAGS, ["main"]) == 0
    said = "stopped: distill, saved after update 3 of 8; the same command goes on from there\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("MINILLM_STOP_CODE", "75")
    assert program.call(main, FLAGS, ["main"]) == 75
    monkeypatch.setenv("MINILLM_STOP_CODE", "often")
    with pytest.raises(InputError, match="MINILLM_STOP_CODE=often: give a whole number"):
        hosts.connect()


DEAF = """
import ctypes
from minillm_jax import stopping
stopping.DEADLINE = 0.2
stopping.listen()
print("up", flush=True)
mutex, lib = ctypes.create_string_buffer(64), ctypes.CDLL(None)
lib.pthread_mutex_lock(mutex)
lib.pthread_mutex_lock(mutex)  # never returns to the interpreter, as a long compilation does not
"""


def test_where_no_safe_point_comes_the_run_ends_all_the_same():
    command = [sys.executable, "-c", DEAF]
    env = os.environ | {"MINILLM_STOP_CODE": "3"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 3
    assert said.startswith("stopped: at the last checkpoint") and said.count("\n") == 1
