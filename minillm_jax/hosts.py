"""One run as several processes, on one host or many: how they find each other and agree.

    JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0, at which it listens, the same everywhere
    JAX_NUM_PROCESSES         how many processes there are
    JAX_PROCESS_ID            which of them this is, from 0
    MINILLM_DISTRIBUTED=auto  in place of the three: jax asks Slurm, Open MPI, GKE or the TPU host
    MINILLM_HOST_TIMEOUT      seconds to wait for the others, 300 by default
    MINILLM_STOP_CODE         exit code after SIGTERM, 0 by default; launchers set another

Without any of these there is one process, and every function here does nothing. `launch/` sets the
environment; what the processes share out among them is not decided here.
"""

import contextlib
import functools
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import numpy as np
from jax._src.distributed import global_state  # the address that a cluster gave is only there
from jax.experimental import multihost_utils

from minillm_jax.rollcall import Absent, roll_call
from minillm_jax.types import InputError

_PORTS = 65535
_CURE = "look at its log, or set a longer MINILLM_HOST_TIMEOUT"
_THREE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def connect() -> None:
    """Join the other processes that the environment tells of, before anything touches a device.

    A process that waits for the others beyond the time-out ends here, with one line on standard
    error and exit code 2.

    Raises:
        InputError: a variable is wrong, no cluster is found, process 0 cannot listen, or the others
            are not those that the variables tell of.
    """
    stop_code()
    place = _place()
    if place is None:
        return
    seconds = _number("MINILLM_HOST_TIMEOUT", 1, default="300")
    if place:
        _call(place["coordinator_address"], place["num_processes"], place["process_id"], seconds)
    # jax would catch SIGTERM itself; `stopping` does.
    jax.config.update("jax_enable_preemption_service", False)
    # When its own time is up jax aborts the process with a stack trace; so ours is up first.
    watch = threading.Timer(seconds, _give_up, [seconds])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**place, initialization_timeout=seconds + 60)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        address = global_state.coordinator_address or place.get("coordinator_address", "")
        raise _unreachable(address, error) from error
    finally:
        watch.cancel()


def _call(address: str, count: int, rank: int, seconds: int) -> None:
    """See that all processes are there: where one is not, it is named.

    Nor does jax say when it cannot listen: it may end by a segmentation fault.
    """
    try:
        roll_call(address, count, rank, seconds)
    except Absent as error:
        waited = f"process {rank} of {count} waited {seconds} s at {address}"
        raise InputError(f"{waited}: {error}; {_CURE}") from error
    except InputError as error:
        raise InputError(f"process {rank} of {count} at {address}: {error}") from error
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    where = f"process 0 listens at {address}" if address else "no cluster was detected"
    return InputError(f"{where}: {error}; set {', '.join(_THREE)} to what is free")


def _place() -> dict[str, Any] | None:
    """Arguments for jax; none where it is to detect them, None where there is one process."""
    given = {name: os.environ[name] for name in _THREE if os.environ.get(name)}
    detect = os.environ.get("MINILLM_DISTRIBUTED", "")
    if detect not in ("", "auto"):
        raise InputError(f"MINILLM_DISTRIBUTED={detect}: set it to auto, or leave it out")
    if not given:
        return {} if detect else None
    if missing := [name for name in _THREE if name not in given]:
        raise InputError(f"{' and '.join(given)} without {' and '.join(missing)}: set all three")
    address = given[_THREE[0]]
    if not re.fullmatch(r".+:[0-9]{1,5}", address) or int(address.rpartition(":")[2]) > _PORTS:
        raise InputError(f"{_THREE[0]}={address}: give HOST:PORT of process 0, up to port {_PORTS}")
    count = _number(_THREE[1], 1)
    index = _number(_THREE[2], 0, count - 1)
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(name: str, low: int, high: int = 10**6, default: str = "") -> int:
    text = os.environ.get(name) or default
    if not (text.isdecimal() and low <= int(text) <= high):
        raise InputError(f"{name}={text}: give a whole number from {low} to {high}")
    return int(text)


def _give_up(seconds: int) -> None:
    """Say which process waited for whom, and end this process, whose main thread is in jax."""
    address, rank = str(global_state.coordinator_address), global_state.process_id
    who = "one of the others did not come up, the one that does not print such a line"
    if rank:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            who = "process 0, which is to listen there, did not come up or is out of reach"
    waited = f"process {rank} of {global_state.num_processes} waited {seconds} s at {address}"
    print(f"error: {waited}: {who}; {_CURE}", file=sys.stderr, flush=True)
    os._exit(2)


def stop_code() -> int:
    """Exit code of a run that SIGTERM has ended.

    Raises:
        InputError: the variable is no such number.
    """
    return _number("MINILLM_STOP_CODE", 0, 255, default="0")


def leave(code: int) -> None:
    """End this process with `code` if there are others; at a usual exit it would wait for them."""
    if jax.distributed.is_initialized() and global_state.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_main() -> bool:
    """Whether this is process 0, which prints and writes what is not sharded."""
    return jax.process_index() == 0


def log() -> TextIO:
    """Where a run says how it is: standard error of process 0, nowhere for the others."""
    return sys.stderr if is_main() else _nowhere()


@functools.cache
def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def barrier(name: str) -> None:
    """Wait until every process is at the barrier of this name."""
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Let process 0 do what follows before the others, so that they find what it has made."""
    if not is_main():
        barrier(name)
    try:
        yield
    finally:  # after an error as well: the others see for themselves
        if is_main():
            barrier(name)


def agree(ok: bool) -> bool:
    """Whether `ok` is true on every process; every one must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def same(number: int, what: str) -> None:
    """See that all processes have the same number from 0 to 2^31 - 1; every one must ask.

    Raises:
        InputError: on all of them, with the first that has another one than process 0.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.asarray(number, np.int32)).ravel()
    if (others := np.flatnonzero(found != found[0])).size:
        raise InputError(
            f"process {others[0]} reads other {what} than process 0: give all hosts the same files"
        )


def least(count: int) -> int:
    """The smallest of the counts of all processes; every one must ask."""
    if jax.process_count() == 1:
        return count
    return int(np.min(multihost_utils.process_allgather(np.asarray(count))))


def lost(error: BaseException) -> bool:
    """Whether an error of jax says that another process of the run cannot be reached any more."""
    gone = re.search(r"(?i)gloo|connection|unavailable|heartbeat|deadline", str(error))
    return jax.process_count() > 1 and gone is not None


def reaches(x: Any) -> bool:
    """Whether this process has all of an array by itself."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def fetch(x: Any) -> np.ndarray:
    """The whole of a global array on every host; every process must ask for it."""
    if reaches(x):
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
