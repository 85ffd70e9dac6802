"""How often the screen is told: joins pieces of an answer, thins reports, counts and times tokens.

Knows clocks and messages, no engine and no widget; called by the bridge.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal

from textual.message import Message

from mimo_local.events import Stats
from tui.messages import AnswerDelta, Pace, TextPiece

JOIN_S = 0.05
"""Pieces are joined for this long: 20 screen updates a second look smooth."""
MAX_JOIN_S = 0.4
"""Two or three updates a second are the least that still looks alive."""
SCREEN_SHARE = 0.25
"""Of one core, for drawing an answer while it is generated."""


def screen_cpu() -> Callable[[], float]:
    """A clock of the CPU seconds the main thread, which draws, has used; stands still elsewhere."""
    thread = threading.main_thread().ident
    if thread is None or not hasattr(time, "pthread_getcpuclockid"):
        return lambda: 0.0
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


class Joiner:
    """Joins pieces so that drawing stays cheap; the first piece goes out at once.

    One `AnswerDelta` per JOIN_S, or rarer where drawing costs so much that the screen would take
    more than SCREEN_SHARE of a core: the model wants that core. An update costs about 15 ms of a
    busy core at 120x40, however long the answer is.
    """

    def __init__(
        self,
        post: Callable[[Message], None],
        later: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] | None = None,
    ) -> None:
        self._post, self._later, self._clock = post, later, clock
        self._cpu = cpu or screen_cpu()
        self._lock = threading.Lock()
        self._pieces: list[TextPiece] = []
        self._pace = Pace()
        self._sent_at = float("-inf")
        self._cpu_then = 0.0
        self._scheduled = False

    def add(self, pieces: Iterable[TextPiece], pace: Pace) -> None:
        """Take pieces; they reach the screen within MAX_JOIN_S even if nothing follows."""
        with self._lock:
            for piece in pieces:
                if self._pieces and self._pieces[-1].kind == piece.kind:
                    piece = TextPiece(piece.kind, self._pieces.pop().text + piece.text)
                self._pieces.append(piece)
            self._pace = pace
            if not self._scheduled:
                self._send_or_wait()

    def flush(self) -> None:
        """Send what is waiting now."""
        with self._lock:
            self._send()

    def _alarm(self) -> None:
        with self._lock:
            self._scheduled = False
            self._send_or_wait()

    def _send_or_wait(self) -> None:
        if not self._pieces:
            return
        drawing = (self._cpu() - self._cpu_then) / SCREEN_SHARE
        wait = self._sent_at + min(MAX_JOIN_S, max(JOIN_S, drawing)) - self._clock()
        if wait > 0:
            self._scheduled = True
            self._later(wait, self._alarm)
        else:
            self._send()

    def _send(self) -> None:
        if self._pieces:
            self._post(AnswerDelta(tuple(self._pieces), self._pace))
            self._pieces = []
            self._sent_at, self._cpu_then = self._clock(), self._cpu()


class Pacer:
    """Lets one report through per `every`: a loader may report every tensor, nobody reads that."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, every: float = JOIN_S
    ) -> None:
        self._clock, self._every = clock, every
        self._sent_at = float("-inf")
        self._stage = ""

    def due(self, stage: str = "", *, last: bool = False) -> bool:
        """Whether to report now; the first and the last of a stage always."""
        now = self._clock()
        if not last and stage == self._stage and now - self._sent_at < self._every:
            return False
        self._sent_at, self._stage = now, stage
        return True


class Meter:
    """Counts the pieces of one answer, about one per token, and times its thinking."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first = self._thought_until = 0.0
        self.pace = Pace()

    def count(self, kind: Literal["thinking", "answer"]) -> Pace:
        """One more piece."""
        now, p = self._clock(), self.pace
        if p.tokens == 0:
            self._first = self._thought_until = now
        thinking = p.thinking_tokens
        if kind == "thinking":
            thinking += 1
            self._thought_until = now
        elapsed = now - self._first
        rate = p.tokens / elapsed if elapsed > 0 else 0.0
        self.pace = Pace(p.tokens + 1, thinking, self._thought_until - self._first, rate)
        return self.pace

    def final(self, stats: Stats) -> Pace:
        """The same with the engine's count: tags and unfinished characters are tokens as well."""
        p, total = self.pace, stats.completion_tokens
        if not p.tokens or not total:
            return p
        thinking = round(total * p.thinking_tokens / p.tokens)
        return Pace(total, thinking, p.thinking_s, stats.decode_tokens_per_s)
