"""Whether to read experts of the next layer before anybody asked: on only while that is faster.

Guesses cost disk time that a demand may need at that moment, so nothing but a measurement decides:
windows of steps with and without prefetching take turns, and the faster way is kept for longer and
longer before the next trial. Pure arithmetic. Called by `tiered`.
"""

from __future__ import annotations

import math
import statistics
from typing import Final

WINDOW: Final = 12
"""Steps of one side of a trial."""
REST: Final = 96
"""Steps until the next trial; doubled each time it ends as the one before, up to MOST_REST."""
MOST_REST: Final = 1536
MARGIN: Final = 0.98
"""Prefetching must take at most this share of the time without."""


class Trial:
    """Step times in, a switch out."""

    def __init__(self) -> None:
        self.on = False
        """Whether this step should prefetch."""
        self.verdict = False
        """How the last trial ended."""
        self.gain: float | None = None
        """Time without / time with prefetching at the last trial; None before the first."""
        self._times: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
        """(rows, seconds) of the steps with and without."""
        self._resting = WINDOW  # the first steps are cold
        self._rest = REST

    def observe(self, seconds: float, rows: int = 1) -> None:
        """A step of so many rows took this long with `on` as it was."""
        if self._resting:
            self._resting -= 1
            if not self._resting:
                self._times = {False: [], True: []}
                self.on = False
            return
        self._times[self.on].append((rows, seconds))
        # A, B, B, A in half windows: a trend of the machine falls on both sides alike.
        done = len(self._times[False]) + len(self._times[True])
        self.on = WINDOW // 2 <= done < WINDOW // 2 + WINDOW
        if done == 2 * WINDOW:
            self._judge()

    def _judge(self) -> None:
        self.gain = self._compare()
        verdict = self.gain * MARGIN > 1
        self._rest = min(2 * self._rest, MOST_REST) if verdict == self.verdict else REST
        self.verdict = self.on = verdict
        self._resting = self._rest

    def _compare(self) -> float:
        """Time without over time with, steps of as many rows beside each other: drafts add rows."""
        by_rows = {
            on: {n: [s for rows, s in times if rows == n] for n in {rows for rows, _ in times}}
            for on, times in self._times.items()
        }
        logs, weights = 0.0, 0
        for n in by_rows[False].keys() & by_rows[True].keys():
            without, with_ = by_rows[False][n], by_rows[True][n]
            weight = min(len(without), len(with_))
            ratio = statistics.median(without) / max(statistics.median(with_), 1e-9)
            logs, weights = logs + weight * math.log(max(ratio, 1e-9)), weights + weight
        return math.exp(logs / weights) if weights else 1.0
