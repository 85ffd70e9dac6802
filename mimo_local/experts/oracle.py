"""The oracle among the policies: how many hits a tier could have had, had it known the future.

Only `replay` can use it: a recorded trace is a future that is known.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Container, Iterable, Iterator

from mimo_local.experts.policy import Key, OneOrder


class Belady(OneOrder):
    """The oracle: told everything that will be wanted, lets go what is wanted last.

    No policy has more hits; it may leave out what would only push out something wanted sooner.
    """

    def __init__(self, capacity: int, future: Iterable[Key]) -> None:
        """`future`: the keys of all touches to come, in their order."""
        self.capacity = capacity
        # Times of use by key and how many are over: 8 bytes a touch, a trace has millions.
        self._uses: dict[Key, array[int]] = {}
        for time, key in enumerate(future):
            self._uses.setdefault(key, array("q")).append(time)
        self._over = dict.fromkeys(self._uses, 0)
        self._held: set[Key] = set()
        self._heap: list[tuple[float, Key]] = []  # minus next use: the last one first

    def touch(self, key: Key) -> bool:
        """`key` is wanted now, as foretold; whether it is held. ValueError if it was not."""
        if self._next(key) == math.inf:
            raise ValueError(f"{key} was not foretold")
        self._over[key] += 1
        if key not in self._held:
            return False
        self._push(key)
        return True

    def admits(self, key: Key, busy: Container[Key] = ()) -> bool:
        """Whether `key` is wanted again sooner than the victim."""
        if not self._full:
            return self._next(key) < math.inf
        victim = self._victim(key, busy)
        return victim is not None and self._next(key) < self._next(victim)

    def remove(self, key: Key) -> None:
        """Hold `key` no longer; KeyError if it is not held."""
        self._held.remove(key)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted(self._held, key=lambda key: (-self._next(key), key)))

    def _next(self, key: Key) -> float:
        uses, over = self._uses.get(key, ()), self._over.get(key, 0)
        return uses[over] if over < len(uses) else math.inf

    def _victim(self, key: Key, busy: Container[Key]) -> Key | None:
        heap, put_back, found = self._heap, [], None
        while heap:
            seen, held = heap[0]
            if held not in self._held or seen != -self._next(held):
                heapq.heappop(heap)
            elif held in busy:
                put_back.append(heapq.heappop(heap))
            else:
                found = held
                break
        for entry in put_back:
            heapq.heappush(heap, entry)
        return found

    def _take(self, key: Key) -> None:
        self._held.add(key)
        self._push(key)

    def _push(self, key: Key) -> None:
        heapq.heappush(self._heap, (-self._next(key), key))
        if len(self._heap) > 4 * len(self._held) + 64:
            self._heap = [(-self._next(held), held) for held in self._held]
            heapq.heapify(self._heap)
