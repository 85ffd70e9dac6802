"""Session: one conversation's ids and cache, and the points it can go back to.

Knows no model and no text. Made by the engine; whoever holds one asks it for nothing but to be
continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from mimo_local.sizes import RESTARTS

if TYPE_CHECKING:
    from mimo_local.cache import KVCache, Snapshot

MAX_SNAPSHOTS: Final = RESTARTS
"""Restart points kept per session: a copy of the rings each, 26 MB for the real model."""


class Session:
    """One conversation's ids and cache; between answers the two always agree.

    Not for two threads at once: while an answer runs, the engine's thread owns it.
    """

    def __init__(self, new_cache: Callable[[], KVCache]) -> None:
        self.ids: list[int] = []
        """The ids whose keys and values the cache holds."""
        self.cache = new_cache()
        self._snapshots: list[Snapshot] = []

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many leading ids the cache already holds."""
        for n, (mine, other) in enumerate(zip(self.ids, ids, strict=False)):
            if mine != other:
                return n
        return min(len(self.ids), len(ids))

    def rewind(self, n: int) -> None:
        """Go back to at most `n` ids, as few less as possible: cut, else a snapshot, else empty."""
        n = min(n, len(self.ids))
        if self.cache.can_truncate(n):
            self.cache.truncate(n)
        else:
            usable = [s for s in self._snapshots if s.length <= n and not s.stale]
            best = max(usable, key=lambda s: s.length, default=None)
            if best is None:
                self.cache.clear()
            else:
                self.cache.restore(best)
        del self.ids[self.cache.length :]
        self._snapshots = [s for s in self._snapshots if not s.stale]

    def remember(self) -> None:
        """Make the present end a point `rewind` can return to from anywhere later."""
        here = self.cache.length
        if here and all(s.length != here for s in self._snapshots):
            self._snapshots = [*self._snapshots[1 - MAX_SNAPSHOTS :], self.cache.snapshot()]


class Unkept:
    """Sessions for engines that keep none between requests."""

    def __init__(self, new_cache: Callable[[], KVCache]) -> None:
        self._new_cache = new_cache

    def take(self, ids: Sequence[int]) -> Session:
        """An empty one, whatever the prompt."""
        return Session(self._new_cache)

    def give_back(self, session: Session) -> None:
        """It is forgotten."""

    def rest(self, interrupted: Callable[[], bool]) -> bool:
        """Nothing to save."""
        return False

    def close(self) -> None:
        """Nothing to end."""
