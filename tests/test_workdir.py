"""A work directory has one run at a time; locks of the dead are recovered."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm_jax import workdir
from minillm_jax.types import InputError
from minillm_jax.workdir import claimed, refuse_busy

ROOT = Path(__file__).parents[1]


def test_a_second_run_is_refused_by_host_and_process_and_the_lock_goes_with_the_first(tmp_path):
    folder = tmp_path / "run"
    refuse_busy(folder)
    with claimed(folder):
        for again in (lambda: refuse_busy(folder), lambda: claimed(folder).__enter__()):
            who = f"{folder} is in use by process {os.getpid()} on {socket.gethostname()}: wait"
            with pytest.raises(InputError, match=who):
                again()
    assert not folder.exists()  # nothing came of it
    folder.mkdir()
    with claimed(folder):
        pass
    assert folder.exists() and not list(folder.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from minillm_jax.workdir import claimed
with claimed(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, timeout=100)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "lock").read_text()
    with claimed(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lock that another host has left, where a minute is a moment."""
    monkeypatch.setattr(workdir, "SILENCE", 0.5)
    (tmp_path / "lock").write_text(json.dumps({"host": "gone", "pid": 7}))
    return tmp_path


def test_the_lock_of_a_host_without_a_sign_of_life_is_no_lock(elsewhere, capsys):
    with claimed(elsewhere):
        assert json.loads((elsewhere / "lock").read_text())["host"] == socket.gethostname()
    assert "is its run on gone over?" in capsys.readouterr().err


def test_a_host_that_shows_signs_of_life_keeps_its_directory(elsewhere):
    def live():
        for _ in range(5):
            time.sleep(0.1)
            os.utime(elsewhere / "lock")

    other = threading.Thread(target=live)
    other.start()
    with pytest.raises(InputError, match="in use by process 7 on gone"), claimed(elsewhere):
        pass
    other.join()
    assert (elsewhere / "lock").exists()


def test_where_the_system_has_no_locks_the_time_of_the_file_tells(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", none)
    monkeypatch.setattr(workdir, "SILENCE", 0.5)
    monkeypatch.setattr(workdir, "_BEAT", 0.05)
    with claimed(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()}"):
        claimed(tmp_path).__enter__()
