"""How a run ends when it is told to, by SIGTERM: at the next safe point, saved, with exit code 0.

A safe point is wherever `check` is called: after an update, between two batches of answers, before
a stage. One that does not come within `DEADLINE` seconds (a long compilation, a process that waits
for a dead one) is not waited for: what is on disk is whole at any time, and the run goes on from
its last checkpoint.
"""

import os
import signal
import sys
import threading
import time

DEADLINE = 18.0  # seconds from the signal to the end of the process

_asked = threading.Event()


class Stopped(Exception):
    """The run was told to end; the message says what is saved."""


def listen():
    """From now on let SIGTERM ask for a stop instead of ending the process."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.siginterrupt(signal.SIGTERM, False)  # no call of a library fails because of it
    # The handler itself would run in the main thread, which may be inside a compilation.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reader,), daemon=True).start()


def ask():
    """Ask for a stop, as SIGTERM does."""
    _asked.set()


def asked() -> bool:
    """Whether this process has been asked to end."""
    return _asked.is_set()


def check(saved: str = ""):
    """A safe point: raise `Stopped` if this process, or another one of the run, was asked to end.

    Every process must call it. `saved` says what has been kept.
    """
    from minillm_jax import hosts  # imports jax, which takes longer than a signal may wait

    if not hosts.agree(not _asked.is_set()):
        raise Stopped(saved)


def say(saved: str):
    """Print how to go on."""
    print(f"stopped{saved and ': '}{saved}; the same command goes on from there", file=sys.stderr)


def _hear(reader: int):
    while signal.SIGTERM not in os.read(reader, 64):
        pass
    ask()
    time.sleep(DEADLINE)
    from minillm_jax import hosts

    if not hosts.global_state.process_id:  # to ask jax might wait for devices
        say("at the last checkpoint, for this step takes longer than the time there is")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(hosts.stop_code())
