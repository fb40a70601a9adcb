"""Who is there: every process tells process 0 its rank, before jax connects them.

jax waits until all are there and does not say who is missing. So process 0 listens first at the
address where jax will listen after it, for a line of each of the others, "minillm RANK COUNT NAME",
and sends all of them what came of it, "minillm go" or the reason why not. NAME is drawn by each
process: one that calls again, after its connection was lost, is no second one. Any other line is of
somebody who has nothing to do with a run.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterable, Iterator

from minillm_jax.types import InputError

_OURS = "minillm "
_GO = "go"
_PAUSE = 0.2  # seconds between two tries to reach process 0
_GRACE = 5.0  # seconds in which process 0, which came later, is to say that its time is up
_LINE = 4096  # most bytes of a line
_READ = 5.0  # most seconds for the line of somebody who has connected

Callers = dict[int, tuple[str, socket.socket]]  # by rank: name and connection


class Absent(InputError):
    """Somebody did not come up in time."""


def roll_call(address: str, count: int, rank: int, seconds: float) -> None:
    """Return once all `count` processes have called process 0 at `address`, HOST:PORT.

    Raises:
        Absent: the ranks that did not come up in so many seconds.
        InputError: two processes have the same rank, or another number of processes.
        OSError: process 0 cannot listen there.
    """
    until = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    if rank:
        line = f"{_OURS}{rank} {count} {secrets.token_hex(8)}\n"
        _answer(host.strip("[]"), int(port), line, until)
    else:
        _ask(int(port), count, until)


def _ask(port: int, count: int, until: float) -> None:
    callers: Callers = {}
    said = "process 0 has ended"  # unless something else is known
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(port))
        told: list[socket.socket] = []
        try:
            while missing := _missing(callers, count):
                if (left := until - time.monotonic()) <= 0:
                    raise Absent(_did_not_come_up(missing))
                server.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    caller = stack.enter_context(server.accept()[0])
                    if not _enter(callers, caller, count, told, until):
                        caller.close()
            said = _GO
        except InputError as error:
            said = str(error)
            raise
        finally:
            for caller in told:
                with contextlib.suppress(OSError):
                    caller.settimeout(_READ)
                    caller.sendall(f"{_OURS}{said}\n".encode())
            for caller in told:  # that they leave first frees the port at once
                with contextlib.suppress(OSError):
                    caller.recv(1)


def _missing(callers: Callers, count: int) -> set[int]:
    """The ranks that are not there; who called and has left is not there any more."""
    if len(callers) == count - 1:
        for rank, (_, caller) in list(callers.items()):
            if not _alive(caller):
                del callers[rank]
    return set(range(1, count)) - callers.keys()


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _enter(callers: Callers, caller: socket.socket, count: int, told: list, until: float) -> bool:
    """Note who called; False if it is no process of a run."""
    try:
        word, *numbers, name = _line(caller, min(until, time.monotonic() + _READ)).split()
        rank, its_count = map(int, numbers)
    except (OSError, ValueError):
        return False
    if word != _OURS.strip() or not 1 <= rank < its_count:
        return False
    told.append(caller)
    if its_count != count:
        raise InputError(f"process {rank} says that there are {its_count} processes, not {count}")
    before = callers.get(rank)
    if before and before[0] != name and _alive(before[1]):
        raise InputError(f"two processes say that they are process {rank}: count them from 0")
    callers[rank] = name, caller
    return True


def _alive(caller: socket.socket) -> bool:
    """Whether a caller that has nothing to say is still there."""
    caller.settimeout(0.0)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _answer(host: str, port: int, line: str, until: float) -> None:
    absent = "process 0, which is to listen there, did not come up or is out of reach"
    why = ""
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as server:
                why = "process 0 was there and has gone"
                server.sendall(line.encode())
                said = _line(server, until + _GRACE)
        except TimeoutError:
            if why:
                why = "process 0 still waits for others, whom its own line will name"
            continue
        except OSError as error:  # not there yet, or gone again
            why = f"{absent} ({error})"
            said = ""
        if said == f"{_OURS}{_GO}":
            return
        if said.startswith(_OURS):
            said = said.removeprefix(_OURS)
            raise Absent(said) if "did not come up" in said else InputError(said)
        time.sleep(_PAUSE)
    raise Absent(why or absent)


def _line(peer: socket.socket, until: float) -> str:
    """What a peer says up to the end of a line; empty if it has left before that.

    Raises:
        TimeoutError: it was not said in time.
    """
    found = b""
    while not found.endswith(b"\n") and len(found) < _LINE:
        if (left := until - time.monotonic()) <= 0:
            raise TimeoutError
        peer.settimeout(left)
        if not (more := peer.recv(_LINE)):
            return ""
        found += more
    return found.decode(errors="replace").strip()


def _did_not_come_up(ranks: Iterable[int]) -> str:
    several = ", ".join(_ranges(sorted(ranks)))
    return f"process{'es' * ('-' in several or ',' in several)} {several} did not come up"


def _ranges(ranks: list[int]) -> Iterator[str]:
    """1, 2, 3, 7 as "1-3", "7"."""
    start = 0
    for i in range(1, len(ranks) + 1):
        if i == len(ranks) or ranks[i] != ranks[i - 1] + 1:
            yield f"{ranks[start]}-{ranks[i - 1]}" if i - 1 > start else f"{ranks[start]}"
            start = i
