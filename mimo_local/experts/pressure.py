"""When other programs need memory: how far the RAM tier should shrink, and when it may grow again.

Looks at what the machine and the cgroup have left, at most every half second, and asks for a budget
that leaves the reserve alone. Shrinks at once and grows slowly, so that two programs that both do
so settle instead of swinging. Called by `tiered` between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from mimo_local.experts import memory
from mimo_local.sizes import gb

INTERVAL: Final = 0.5
"""Seconds between two looks: one costs some 0.2 ms of reading small files."""
CALM: Final = 10.0
"""Seconds without pressure before the tier grows again."""


class Pressure:
    """The tier's budget as it should be now."""

    def __init__(
        self,
        slot_bytes: int,
        budget: int,
        reserve: int | None = None,
        *,
        free: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`budget`: what it is without pressure; `free`: bytes available, replaced in tests."""
        self.slot_bytes, self.budget = slot_bytes, budget
        # Half of what was left free at first: what the system takes of it is no pressure yet.
        self.reserve = memory.reserve() // 2 if reserve is None else reserve
        self.current = budget
        self.notes: list[str] = []
        self._free = free or memory.available_memory
        self._clock = clock
        self._looked = clock()
        self._pressed = clock() - CALM

    def wish(self) -> int | None:
        """The budget to change to; None: nothing to do, or too early to look."""
        now = self._clock()
        if now - self._looked < INTERVAL:
            return None
        self._looked = now
        left = self._free() - self.reserve
        if left < 0:
            self._pressed = now
            return self._set(self.current + left - self.slot_bytes)
        if self.current < self.budget and now - self._pressed >= CALM:
            # Half of what is free: whoever else grows gets the other half.
            step = left // 2 // self.slot_bytes * self.slot_bytes
            return self._set(self.current + step) if step else None
        return None

    def _set(self, budget: int) -> int | None:
        budget = max(0, min(budget, self.budget))
        if budget == self.current:
            return None
        self.current = budget
        self.notes = []
        if budget < self.budget:
            self.notes = [
                f"memory is short: experts take {gb(budget)} instead of {gb(self.budget)}"
            ]
        return budget
