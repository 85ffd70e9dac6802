"""Bytes of a conversion done, and when the rest will be, told at most ten times a second.

Knows a clock and names of tensors. Called by `convert` and, piece by piece, by `making`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from mimo_local.events import Progress
from quant.inventory import layer_of
from quant.pack import OnProgress


class Meter:
    """Bytes of source done, and when the rest will be, from the rate of the last 30 seconds."""

    def __init__(
        self,
        total: int,
        on_progress: OnProgress | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._on_progress = on_progress
        self._clock = clock
        self._done = 0
        self._marks = deque([(clock(), 0)])
        self._told = float("-inf")

    def skip(self, n: int) -> None:
        """Bytes an earlier run did: they count as done and say nothing about the rate."""
        self._done += n
        self._marks = deque([(self._clock(), self._done)])

    def add(self, n: int, stage: str) -> None:
        """Count bytes of this run."""
        self._done += n
        now = self._clock()
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - 30:
            self._marks.popleft()
        if now - self._told >= 0.1:
            self._tell(stage, now)

    def finish(self) -> None:
        """Say that all is done."""
        self._done = self._total
        self._tell("converted", self._clock())

    def _tell(self, stage: str, now: float) -> None:
        self._told = now
        if self._on_progress:
            since, base = self._marks[0]
            rate = (self._done - base) / (now - since) if now > since else 0.0
            eta = (self._total - self._done) / rate if rate > 0 else None
            self._on_progress(Progress(stage, self._done, self._total, eta_s=eta))


def stage_of(name: str) -> str:
    """What is being done with this tensor, for people."""
    layer = layer_of(name)
    if layer is not None:
        return f"converting layer {layer}"
    return "converting MTP layers" if ".mtp." in name else "converting embedding and head"
