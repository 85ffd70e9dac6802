"""Session: one conversation's ids and cache, and the points it can go back to.

Knows no model and no text. `session_pool` keeps them; the engine continues them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from mimo_local.sizes import RESTARTS

if TYPE_CHECKING:
    from mimo_local.cache import KVCache, Snapshot

MAX_SNAPSHOTS: Final = RESTARTS
"""Restart points kept per session: a copy of the rings each, 26 MB for the real model."""
LONG: Final = 1024
"""New ids of a prompt that holds more than a question: a document and what is asked about it."""
NEAR_END: Final = (512, 64)
"""Where such a prompt gets restart points, in ids before its end: most questions begin after."""


class Session:
    """One conversation's ids and cache; between answers the two always agree.

    Not for two threads at once: while an answer runs, the engine's thread owns it.
    """

    def __init__(self, new_cache: Callable[[], KVCache]) -> None:
        self.ids: list[int] = []
        """The ids whose keys and values the cache holds."""
        self.cache = new_cache()
        self.untouched = 0
        """Rows that are as they were when somebody last set this: going back lowers it."""
        self._new_cache = new_cache
        self._snapshots: list[Snapshot] = []

    @property
    def points(self) -> tuple[Snapshot, ...]:
        """The restart points, earliest first."""
        return tuple(s for s in self._snapshots if not s.stale)

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many leading ids the cache already holds."""
        return common_prefix(self.ids, list(ids))

    def usable_prefix(self, ids: Sequence[int], *, running: bool = False) -> int:
        """How many of `ids` need not be processed to continue them; always fewer than all.

        At least one id must go through the model: its logits are where the answer starts.
        `running`: of a session that is answering, only what its restart points hold is certain.
        """
        return self._way(min(self.common_prefix(ids), len(ids) - 1), running)[1]

    def rewind(self, n: int) -> None:
        """Go back to at most `n` ids, as few less as possible: cut, else a snapshot, else empty."""
        point, n = self._way(min(n, len(self.ids)))
        if point is not None:
            self.cache.restore(point)
        if n and n < self.cache.length:
            self.cache.truncate(n)
        elif not n:
            self.cache.clear()
        del self.ids[n:]
        self.untouched = min(self.untouched, n)
        self._snapshots = list(self.points)

    def _way(self, n: int, running: bool = False) -> tuple[Snapshot | None, int]:
        """The restart point to go back by to at most n ids (None: a cut will do), and how far."""
        if not running and self.cache.can_truncate(n):
            return None, n
        best = max(self._snapshots, key=lambda s: s.reach(n), default=None)
        reach = 0 if best is None else best.reach(n)
        return (best, reach) if reach else (None, 0)

    def fork(self, n: int, *, running: bool = False) -> Session:
        """A session of its own that begins as this one and goes on after at most `n` ids.

        As `rewind`, but this one stays as it is; the copy takes as many bytes again.
        """
        point, n = self._way(min(n, len(self.ids)), running)
        copy = Session(self._new_cache)
        if n:
            kept = [s for s in self.points if s.length <= n]
            copy._snapshots = self.cache.fork(copy.cache, point, kept)
            copy.ids = self.ids[: copy.cache.length]
            copy.rewind(n)
        return copy

    def resume(self, ids: list[int], points: Sequence[Snapshot]) -> None:
        """Take over restart points that its cache adopted, and go on at the last of them."""
        self._snapshots = list(points)
        self.cache.restore(points[-1])
        self.ids = ids[: self.cache.length]

    def foresee(self, total: int) -> None:
        """A prompt of `total` ids will be read: plan for other questions about the same text."""
        near = [total - back for back in NEAR_END] if total - len(self.ids) >= LONG else []
        while len(self._snapshots) + len(near) > MAX_SNAPSHOTS:
            del self._snapshots[self._least_needed()]
        self.cache.catch(near)

    def remember(self) -> None:
        """Make the present end a point `rewind` can return to from anywhere later."""
        here = self.cache.length
        new = self.cache.caught()
        if here and all(s.length != here for s in self._snapshots):
            new.append(self.cache.snapshot())
        for snapshot in new:
            self._snapshots.append(snapshot)
            if len(self._snapshots) > MAX_SNAPSHOTS:
                del self._snapshots[self._least_needed()]

    def _least_needed(self) -> int:
        """Which point to give up: the one in the smallest gap, as seen from the end.

        Turns are edited near the end more often than long before it: points lie the wider apart
        the older they are. Wherever one goes back to, what is read again is about as much as was
        said since, at most (60 turns: 0.8 of it). The newest two, an answer's ends, stay.
        """
        lengths = [0, *(s.length for s in self._snapshots)]
        end, last = lengths[-1], lengths[-1] - lengths[-2]

        def gap(i: int) -> float:
            before, after = lengths[i], lengths[i + 2]
            return (after - before) / (end - after + last)

        return min(range(len(self._snapshots) - 2), key=gap)


def common_prefix(mine: list[int], other: list[int]) -> int:
    """How many leading ids two lists share: halves compared whole, 0.3 ms for 30 000 ids."""
    low, high = 0, min(len(mine), len(other))
    if mine[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if mine[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
