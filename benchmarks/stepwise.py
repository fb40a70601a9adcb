"""A program that makes one step whenever it is told to, so that two can be timed in turn.

The two ends of a line-wise conversation: a line on standard input asks for a step, a line of JSON
on standard output says that it is done. Standard library alone: one end may run in another
environment, without jax.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any


class Steps:
    """The end that asks."""

    def __init__(self, command: Sequence[str]):
        """Start the program and wait until it is ready; `about` is what it says of itself.

        Raises:
            RuntimeError: it ended before; why is on standard error.
        """
        self.command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def step(self) -> tuple[float, dict[str, Any]]:
        """Seconds of one step, and what the program says of itself after it."""
        began = time.perf_counter()
        assert self._process.stdin
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer()
        return time.perf_counter() - began, answer

    def end(self) -> None:
        """Let the program go."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self._process.wait()}")
        return json.loads(line)


class Asked:
    """The end that is asked: iterate over it and `answer` after each step."""

    def __init__(self):
        """Keep standard output for the answers; what libraries print goes to standard error."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[str]:
        """One turn for every step that is asked for."""
        return iter(sys.stdin)

    def answer(self, **about: Any) -> None:
        """Say that a step is done, with the peak of this process's memory so far, in bytes."""
        self._out.write(json.dumps(about | {"peak_bytes": peak_bytes()}) + "\n")
        self._out.flush()


def peak_bytes() -> int:
    """The most memory that this process has held; getrusage would say its parent's, too."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
