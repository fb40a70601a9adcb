"""Processes that call process 0, as threads: who is missing, who is there twice, who is strange."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from minillm_jax import rollcall
from minillm_jax.rollcall import roll_call
from minillm_jax.types import InputError


@pytest.fixture
def address() -> str:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def called(address, ranks, count, seconds, counts=None):
    """What the processes of these ranks are told: None where all are there."""

    def one(rank, count):
        try:
            roll_call(address, count, rank, seconds)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks, counts or [count] * len(ranks)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_are_there(address, count):
    assert called(address, range(count), count, 20) == [None] * count
    # The port is free at once for jax, and for another run.
    assert called(address, range(count), count, 20) == [None] * count


def test_process_0_may_come_late(address):
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(roll_call, address, 2, 1, 20)
        time.sleep(0.5)
        assert not other.done()
        roll_call(address, 2, 0, 20)
        assert other.result() is None


@pytest.mark.parametrize(
    ("ranks", "count", "missing"),
    [
        ([0, 1], 3, "process 2 did not come up"),
        ([0, 3], 8, "processes 1-2, 4-7 did not come up"),
        ([0], 2, "process 1 did not come up"),
        ([0, 2], 4, "processes 1, 3 did not come up"),
    ],
)
def test_those_that_are_missing_are_named(address, ranks, count, missing):
    assert called(address, ranks, count, 1.5) == [missing] * len(ranks)


def test_without_process_0_it_is_process_0_that_is_missing(address):
    (said,) = called(address, [1], 2, 0.5)
    assert said and said.startswith("process 0, which is to listen there, did not come up")


def test_a_rank_that_two_have_is_told_to_both(address):
    said = called(address, [0, 1, 1], 3, 20)
    assert said == ["two processes say that they are process 1: count them from 0"] * 3


def test_another_number_of_processes_is_told(address):
    said = called(address, [0, 1], 2, 20, [2, 4])
    assert said == ["process 1 says that there are 4 processes, not 2"] * 2


def open_to(address):
    """A connection to process 0, which is about to listen."""
    host, port = address.split(":")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
        time.sleep(0.02)


STRANGE = (b"", b"GET / HTTP/1.1\r\n\r\n", b"minillm 0 3 a\n", b"minillm 3 3 a\n", b"minillm 1 x\n")


def test_strangers_and_the_dead_are_no_processes(address):
    """A port is open to all: what says nothing or nonsense does not count, nor who has left."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll_call, address, 3, 0, 20)
        for line in (*STRANGE, b"minillm 1 3 a\n"):
            with open_to(address) as peer:
                peer.sendall(line)
        with open_to(address) as second:  # two have called; one of them has left
            second.sendall(b"minillm 2 3 b\n")
            time.sleep(0.5)
            assert not first.done()
            roll_call(address, 3, 1, 20)
            assert second.recv(20) == b"minillm go\n"
        assert first.result() is None


def test_what_is_no_process_0_is_not_believed(address):
    host, port = address.split(":")
    stop = threading.Event()

    def web_server():
        with socket.create_server((host, int(port))) as server:
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError), server.accept()[0] as caller:
                    caller.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    other = threading.Thread(target=web_server)
    other.start()
    try:
        (said,) = called(address, [1], 2, 1)
    finally:
        stop.set()
        other.join()
    assert said == "process 0 was there and has gone"


def test_a_process_0_that_fails_sends_nobody_on(address, monkeypatch):
    def fail(callers, count):
        if callers:
            raise RuntimeError("odd")
        return {1, 2}

    monkeypatch.setattr(rollcall, "_missing", fail)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll_call, address, 3, 0, 20)
        assert called(address, [1], 3, 20) == ["process 0 has ended"]
        assert isinstance(first.exception(), RuntimeError)


def test_one_that_calls_again_is_no_second_one(address):
    """Its first connection may look alive to process 0: what was lost on the way says nothing."""
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as held:
        first = pool.submit(roll_call, address, 3, 0, 20)
        peers = [held.enter_context(open_to(address)) for _ in range(2)]
        for peer in peers:
            peer.sendall(b"minillm 1 3 me\n")
        roll_call(address, 3, 2, 20)
        assert peers[1].recv(20) == b"minillm go\n"
        held.close()
        assert first.result() is None


def test_slow_callers_hold_nobody_up_for_long(address, monkeypatch):
    monkeypatch.setattr(rollcall, "_READ", 0.3)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll_call, address, 2, 0, 20)
        with open_to(address), open_to(address) as drop:  # one says nothing, one a byte at a time
            other = threading.Thread(target=roll_call, args=(address, 2, 1, 20))
            other.start()
            while not first.done() and time.monotonic() - began < 10:
                with contextlib.suppress(OSError):
                    drop.sendall(b"m")
                time.sleep(0.05)
        assert first.result() is None
        other.join()
    assert time.monotonic() - began < 5


def test_a_port_in_use_is_an_error_of_the_system():
    with socket.create_server(("", 0)) as taken, pytest.raises(OSError):
        roll_call(f"localhost:{taken.getsockname()[1]}", 2, 0, 5)
