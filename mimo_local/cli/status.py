"""What goes to stderr: notes, and one line of progress that rewrites itself on a terminal.

stdout belongs to the answer. In a log a line is written every ten seconds. Knows only `events`;
used by all commands.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from mimo_local.events import Prefill, Progress

TERMINAL_S, LOG_S = 0.1, 10.0  # least time between two updates
BAR = 8  # the longest line, of a file being verified, fits 80 columns


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def colours(stream: TextIO) -> bool:
    """Whether `stream` may get escape codes: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def clean(text: str) -> str:
    """Text for a terminal: without the control characters a model or a server could slip in."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def amount(n: float, unit: str) -> str:
    """A count with its unit; bytes as MB or GB."""
    from mimo_local.sizes import gb  # brings the config reader: not for `mimo --help`

    return gb(n) if unit == "bytes" else f"{n:,.0f} {unit}"


class Status:
    """A callback for Progress and Prefill; `clear()` before anything else is written."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._live = self._stream.isatty()
        self._work: tuple[str, int] | None = None
        self._since, self._from = 0.0, 0
        self._shown_at = float("-inf")
        self._width = 0

    def __call__(self, event: Progress | Prefill) -> None:
        """Show `event` unless the last update was a moment ago."""
        if isinstance(event, Prefill):
            event = Progress("reading the prompt", event.done, event.total, "tokens")
        now = self._clock()
        # "verifying a", "verifying b" of one total are one piece of work: one rate, one line.
        work = (event.stage.partition(" ")[0], event.total)
        if work != self._work:
            if self._work is None and not self._live:
                self._shown_at = now  # in a log, work of a few seconds is not worth a line
            self._work, self._since, self._from = work, now, event.done
        due = now - self._shown_at >= (TERMINAL_S if self._live else LOG_S)
        ended = self._live and event.total > 0 and event.done >= event.total
        if not (due or ended):
            return
        self._shown_at = now
        self._write(line(event, self._eta(event, now)))

    def clear(self) -> None:
        """Remove the line from the terminal."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def _eta(self, event: Progress, now: float) -> float | None:
        if event.eta_s is not None or event.total <= 0:
            return event.eta_s
        elapsed, done = now - self._since, event.done - self._from
        # The first second is start-up: an estimate from it jumps.
        return elapsed * (event.total - event.done) / done if elapsed > 1 and done > 0 else None

    def _write(self, text: str) -> None:
        if not self._live:
            self._stream.write(text + "\n")
        else:
            text = text[: max(20, shutil.get_terminal_size().columns - 1)]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        self._stream.flush()


def line(event: Progress, eta_s: float | None = None) -> str:
    """One line of progress: stage, bar, amounts, time left."""
    if event.total <= 0:
        return f"{event.stage}  {amount(event.done, event.unit)}"
    share = min(1.0, event.done / event.total)
    bar = "#" * round(share * BAR)
    unit = event.unit
    done = amount(event.done, unit) if unit == "bytes" else f"{event.done:,}"
    text = f"{event.stage}  [{bar:.<{BAR}}] {share:4.0%}  {done}/{amount(event.total, unit)}"
    return text + (f"  {duration(eta_s)} left" if eta_s else "")
