"""What the terminal shows: a progress bar while a stage runs, and the table at the end.

On a terminal both are drawn with rich. Elsewhere they are plain lines, few enough for a log.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from minillm_jax import hosts
from minillm_jax.reporting import formats, results
from minillm_jax.reporting.metrics import MovingAverage, Rate


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def live_line(
    stage: str,
    step: int,
    total: int,
    *,
    headline: tuple[str, float] | None = None,
    tokens_per_second: float = math.nan,
    seconds_left: float = math.nan,
) -> str:
    """One line on where a stage is; what is not finite is left out."""
    parts = [f"{stage:<15} {step:>{len(str(total))}}/{total}"]
    if headline is not None and math.isfinite(headline[1]):
        name, number = headline
        parts.append(
            f"{name.replace('_', ' ').replace(' kl', ' KL')} {formats.significant(number)}"
        )
    if math.isfinite(tokens_per_second) and tokens_per_second > 0:
        parts.append(f"{formats.count(tokens_per_second)} tokens/s")
    if math.isfinite(seconds_left) and step < total:
        parts.append(f"{formats.duration(seconds_left)} left")
    return "  ".join(parts)


class Progress:
    """Progress of one stage: steps, a headline metric, tokens/s and time left.

    ```
    with Progress("distill", total=40, headline="reverse_kl") as bar:
        bar.update(step, tokens=512, metrics={"reverse_kl": 0.53})
    ```
    `start` is the step a resumed stage goes on from. The headline is the mean of its last
    `window` values. Off a terminal a line is printed at most every `interval` seconds, and the
    last one always.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        headline: str = "",
        start: int = 0,
        interval: float = 10.0,
        window: int = 8,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage, self._total, self._headline = stage, total, headline
        self._step, self._interval, self._clock = start, interval, clock
        self._stream = stream or hosts.log()
        self._average = MovingAverage(window)
        self._steps, self._tokens = Rate(clock=clock), Rate(clock=clock)
        self._printed_at, self._printed_step = -math.inf, -1
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if is_terminal(self._stream):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=Console(file=self._stream),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.line(), total=self._total, completed=self._step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._print()

    def update(
        self, step: int, tokens: float = 0, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """`step` steps are done; `tokens` were processed since the last call."""
        self._steps.add(step - self._step)
        self._tokens.add(tokens)
        self._step = step
        number = (metrics or {}).get(self._headline)
        if number is not None:
            self._average.add(float(number))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self.line())
        elif self._clock() - self._printed_at >= self._interval:
            self._print()

    def log(self, message: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            _say(message, self._stream)

    def line(self) -> str:
        """The present state as text."""
        per_second = self._steps.value if self._steps.settled else math.nan
        left = (self._total - self._step) / per_second if per_second > 0 else math.nan
        return live_line(
            self._stage,
            self._step,
            self._total,
            headline=(self._headline, self._average.value) if self._headline else None,
            tokens_per_second=self._tokens.value,
            seconds_left=left,
        )

    def _print(self) -> None:
        if self._printed_step != self._step:
            _say(self.line(), self._stream)
        self._printed_at, self._printed_step = self._clock(), self._step


def print_table(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the held-out figures of every model and the findings in words."""
    out: TextIO = stream or sys.stdout
    columns = results.columns(summary)
    rows = [
        [results.label(m), *(results.cell(summary, m, c) for c in columns)]
        for m in results.models(summary)
    ]
    if not rows:
        return
    table = [["", *(c.label for c in columns)], ["", *(c.unit for c in columns)], *rows]
    draw = _print_rich if is_terminal(out) else _print_plain
    draw(table, results.findings(summary), out)


def _widths(table: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _print_plain(table: list[list[str]], findings: list[str], stream: TextIO) -> None:
    widths = _widths(table)
    for first, *rest in table:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        _say("  ".join([first.ljust(widths[0]), *cells]).rstrip(), stream)
    for line in findings:
        _say(line, stream)


def _print_rich(table: list[list[str]], findings: list[str], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    labels, units, *rows = table
    if sum(_widths(table)) + 3 * len(labels) > console.width:
        # A narrow terminal: one line per figure, one column per model, no units.
        headings = [Text(row[0].replace(", ", "\n")) for row in [labels, *rows]]
        rows = [list(row) for row in zip(labels, *rows, strict=True)][1:]
    else:
        headings = [
            Text.assemble(label, "\n", (unit, "dim"))
            for label, unit in zip(labels, units, strict=True)
        ]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(Text, row))  # Text: a name out of a file is not markup
    console.print(drawn)
    for i, line in enumerate(findings):
        console.print(Text(line, style="bold green" if i == 0 else ""))


def _say(line: str, stream: TextIO) -> None:
    # A log with an ASCII encoding gets question marks, not an exception after a long run.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
