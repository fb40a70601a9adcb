"""Who is there: every process tells process 0 its rank, before jax connects them.

jax waits until all are there and does not say who is missing. So process 0 listens first at the
address where jax will listen after it, for a line of each of the others, "minillm RANK COUNT NAME",
and sends all of them what came of it: "go", or the reason why not. NAME is drawn by each process:
one that calls again, after its connection was lost, is no second one.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterable, Iterator

from minillm_jax.types import InputError

_PAUSE = 0.2  # seconds between two tries to reach process 0
_LINE = 4096  # most bytes of a line
_READ = 5.0  # most seconds for a line of somebody who has connected

Callers = dict[int, tuple[str, socket.socket]]  # by rank: name and connection


def roll_call(address: str, count: int, rank: int, seconds: float) -> None:
    """Return once all `count` processes have called process 0 at `address`, HOST:PORT.

    Raises:
        InputError: the ranks that did not come up in so many seconds, a rank that two processes
            have, or another number of processes elsewhere.
        OSError: process 0 cannot listen there.
    """
    until = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    if rank:
        line = f"minillm {rank} {count} {secrets.token_hex(8)}\n"
        _answer(host.strip("[]"), int(port), line, until)
    else:
        _ask(int(port), count, until)


def _ask(port: int, count: int, until: float) -> None:
    callers: Callers = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(port))
        said = "go"
        try:
            while len(callers) < count - 1:
                if (left := until - time.monotonic()) <= 0:
                    raise InputError(_absent(set(range(1, count)) - callers.keys()))
                server.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    caller = stack.enter_context(server.accept()[0])
                    _enter(callers, caller, count)
        except InputError as error:
            said = str(error)
            raise
        finally:
            for _, caller in callers.values():
                with contextlib.suppress(OSError):
                    caller.sendall(said.encode() + b"\n")
            for _, caller in callers.values():  # that they leave first frees the port at once
                with contextlib.suppress(OSError):
                    caller.recv(1)


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _enter(callers: Callers, caller: socket.socket, count: int) -> None:
    """Note who called; what is no process of a run is let go."""
    caller.settimeout(_READ)
    try:
        word, *numbers, name = _line(caller).split()
        rank, its_count = map(int, numbers)
    except (OSError, ValueError):
        return
    if word != "minillm" or rank < 1:
        return
    if its_count != count:
        callers[rank] = name, caller
        raise InputError(f"process {rank} says that there are {its_count} processes, not {count}")
    before = callers.get(rank)
    if before and before[0] != name and _alive(before[1]):
        callers[count] = name, caller  # to be told, too
        raise InputError(f"two processes say that they are process {rank}: count them from 0")
    callers[rank] = name, caller


def _alive(caller: socket.socket) -> bool:
    """Whether a caller that has nothing to say is still there."""
    caller.settimeout(0.0)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        caller.settimeout(_READ)


def _answer(host: str, port: int, line: str, until: float) -> None:
    reached = False
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as server:
                server.sendall(line.encode())
                reached = True
                said = _line(server)
        except OSError:  # not there yet, or gone again
            said = ""
        if said == "go":
            return
        if said:
            raise InputError(said)
        time.sleep(_PAUSE)
    if reached:
        raise InputError("process 0 still waits for others, whom its own line will name")
    raise InputError("process 0, which is to listen there, did not come up or is out of reach")


def _line(peer: socket.socket) -> str:
    """What a peer says up to the end of a line; empty if it has left before that."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _LINE:
        if not (more := peer.recv(_LINE)):
            return ""
        found += more
    return found.decode(errors="replace").strip()


def _absent(ranks: Iterable[int]) -> str:
    several = ", ".join(_ranges(sorted(ranks)))
    return f"process{'es' * ('-' in several or ',' in several)} {several} did not come up"


def _ranges(ranks: list[int]) -> Iterator[str]:
    """1, 2, 3, 7 as "1-3", "7"."""
    start = 0
    for i in range(1, len(ranks) + 1):
        if i == len(ranks) or ranks[i] != ranks[i - 1] + 1:
            yield f"{ranks[start]}-{ranks[i - 1]}" if i - 1 > start else f"{ranks[start]}"
            start = i
