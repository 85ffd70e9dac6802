"""When to try again: waits that grow, the server's own wish, and an end to it.

Knows no network. Called by `hub` and `fetch`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, TypeAlias

from mimo_local.errors import DownloadError

Wait: TypeAlias = Callable[[float], object]
"""Sleeps for some seconds, or until the work is stopped."""

TRIES: Final = 8
FIRST_S: Final = 1.0
MOST_S: Final = 60.0
TOLD_S: Final = 1.5
LONGEST_S: Final = 900.0
"""A server that wants to be left alone for longer is not waited for."""


class TransientError(Exception):
    """A failure that another try may heal; `after`: seconds the server asked to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Patience:
    """Counts failures in a row: 8 of them, about 2 minutes, are too many."""

    def __init__(self, wait: Wait, tell: Callable[[str], None] | None = None) -> None:
        """`tell`: called with the reason before a wait that somebody would notice."""
        self._wait, self._tell = wait, tell
        self._failed = 0

    def moved(self) -> None:
        """Something arrived: failures before it no longer count."""
        self._failed = 0

    def again(self, failure: TransientError, what: str) -> None:
        """Wait before another try; DownloadError when there have been enough."""
        self._failed += 1
        if self._failed >= TRIES or (failure.after or 0) > LONGEST_S:
            wish = f", come back in {failure.after / 60:.0f} min" if failure.after else ""
            raise DownloadError(
                f"{what} cannot be fetched: {failure}{wish}",
                hint="check the network and run the command again: it goes on where it stopped",
            ) from failure
        # Spread, or all connections would come back in the same moment.
        grown = min(MOST_S, FIRST_S * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)
        seconds = grown if failure.after is None else failure.after
        if self._tell and seconds >= TOLD_S:
            self._tell(f"{what}: {failure}; trying again in {seconds:.0f} s")
        self._wait(seconds)
