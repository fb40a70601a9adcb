"""Several processes: how they find each other, agree, and say who is missing."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm_jax import hosts
from minillm_jax.types import InputError
from tests.toy_run import command

# How ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")
ROOT = Path(__file__).parents[1]
ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TALK = """
from absl import flags
from minillm_jax import hosts, program

def main(argv):
    hosts.connect()
    import jax
    rank = jax.process_index()
{body}

program.run(main, flags.FlagValues())
"""


@pytest.fixture
def address() -> str:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def start(
    body: str,
    address: str,
    ranks: list[int],
    count: int,
    timeout: int = 60,
    environ: dict[str, str] | None = None,
):
    """Start the processes `ranks` of `count`, and return (exit code, output, error) of each."""
    source = TALK.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "MINILLM_HOST_TIMEOUT": str(timeout)}
    base |= {ADDRESS: address, COUNT: str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", source],
            env=base | {ID: str(rank)} | (environ or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_meet_and_agree(address, count):
    body = """
first = hosts.agree(True), hosts.agree(rank != 1)
hosts.barrier("half")
print("found", rank, hosts.is_main(), jax.process_count(), first)
"""
    for rank, (code, out, err) in enumerate(start(body, address, list(range(count)), count)):
        assert code == 0, err
        assert f"found {rank} {rank == 0} {count} (True, False)" in out


def test_other_data_on_one_host_is_told_to_all(address):
    body = """
hosts.same(7, "examples")
hosts.same(rank // 2, "examples")
"""
    for code, _, err in start(body, address, [0, 1, 2], 3):
        assert code == 2
        assert "error: process 2 reads other examples than process 0: give all hosts" in err


def test_dry_run_prints_once(address, tmp_path):
    body = f"""
from minillm_jax import main as command, pipeline
pipeline.describe = lambda *words: {{"processes": jax.process_count()}}
hosts.connect = lambda: None  # done
config = "--config=configs/quickstart.py:smoke"
command.main(command.FLAGS(["main", config, "--workdir={tmp_path}", "--dry_run"]))
"""
    ends = start(body, address, [0, 1], 2)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert '"processes": 2' in ends[0][1] and "processes" not in ends[1][1]


@pytest.mark.parametrize("ranks", [[0, 1], [1, 2]], ids=["a worker", "the coordinator"])
def test_missing_process_is_told(address, ranks):
    began = time.monotonic()
    ends = start("", address, ranks, 3, timeout=3)
    assert time.monotonic() - began < 40
    for rank, (code, out, err) in zip(ranks, ends, strict=True):
        (line,) = err.splitlines()
        assert code == 2 and not out
        assert line.startswith(f"error: process {rank} of 3 waited 3 s at {address}: ")
        if 0 not in ranks:
            assert "process 0, which is to listen there, did not come up" in line
        elif rank == 0:
            assert "process 2 did not come up; look at its log" in line
        else:
            assert "process 2 did not come up; look at its log" in line


def test_a_rank_that_two_have_is_told_to_both(address):
    for code, _, err in start("", address, [0, 1, 1], 3):
        assert code == 2 and "two processes say that they are process 1" in err


def test_failure_of_one_does_not_wait_for_the_others(address):
    body = """
from minillm_jax.types import InputError
if rank == 1:
    raise InputError("no file x: give another")
hosts.barrier("never")
"""
    began = time.monotonic()
    ends = start(body, address, [0, 1], 2)
    assert time.monotonic() - began < 60  # and not the 300 s of jax's own farewell
    assert ends[1][0] == 2 and ends[1][2].splitlines()[-1] == "error: no file x: give another"
    assert ends[0][0] not in (0, None)


def test_an_ordinary_exception_leaves_with_its_traceback(address):
    ends = start("if rank: raise KeyError('odd')\nhosts.barrier('never')", address, [0, 1], 2)
    assert ends[1][0] == 1 and ends[1][2].rstrip().endswith("KeyError: 'odd'")


def test_port_in_use_is_told():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        ((code, _, err),) = start("", address, [0], 2)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: process 0 listens at {address}: ")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({ADDRESS: "a:1"}, f"{ADDRESS} without {COUNT} and {ID}: set all three"),
        ({COUNT: "2", ID: "0"}, f"{COUNT} and {ID} without {ADDRESS}"),
        ({ADDRESS: "here", COUNT: "2", ID: "0"}, f"{ADDRESS}=here: give HOST:PORT"),
        ({ADDRESS: "a:1", COUNT: "two", ID: "0"}, f"{COUNT}=two: give a whole number"),
        ({ADDRESS: "a:1", COUNT: "0", ID: "0"}, f"{COUNT}=0: give a whole number from 1"),
        ({ADDRESS: "a:1", COUNT: "2", ID: "2"}, f"{ID}=2: give a whole number from 0 to 1"),
        ({ADDRESS: "a:1", COUNT: "2", ID: "-1"}, f"{ID}=-1: give a whole number from 0 to 1"),
        ({"MINILLM_DISTRIBUTED": "yes"}, "MINILLM_DISTRIBUTED=yes: set it to auto"),
        ({"MINILLM_DISTRIBUTED": "auto", "MINILLM_HOST_TIMEOUT": "5m"}, "MINILLM_HOST_TIMEOUT=5m"),
    ],
)
def test_contradictions_are_refused(monkeypatch, environ, says):
    for name in (ADDRESS, COUNT, ID, "MINILLM_DISTRIBUTED", "MINILLM_HOST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        hosts.connect()
    assert says in str(error.value)


def test_main_connects(monkeypatch, capsys):
    for name in (ADDRESS, ID):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(COUNT, "2")
    assert command(monkeypatch, "main", "--config=configs/quickstart.py", "--dry_run") == 2
    assert "set all three" in capsys.readouterr().err


def test_no_cluster_to_detect():
    empty = {ADDRESS: "", COUNT: "", ID: "", "MINILLM_DISTRIBUTED": "auto"}
    ((code, _, err),) = start("", "", [0], 1, environ=empty)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: no cluster was detected: ")


def test_one_process_needs_nothing(monkeypatch):
    for name in (ADDRESS, COUNT, ID, "MINILLM_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    hosts.connect()
    hosts.barrier("alone")
    hosts.leave(2)
    assert hosts.is_main() and hosts.agree(True) and not hosts.agree(False)
