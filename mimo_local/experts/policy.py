"""Which experts a tier holds and which one goes next: decisions only, no tensors and no bytes.

Deterministic, so that a recorded routing trace replays to the same hits (`mimo replay`). Every
operation is O(1) or O(log n) plus the busy keys it steps over; iterating and resizing are not.
A tier asks, for each layer step: `touch` every expert wanted; `insert` the missing ones that
`admits` lets in, with all wanted ones as `busy`; and `end_of_step` after the last layer.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from itertools import islice, zip_longest
from typing import Final, TypeAlias

Key: TypeAlias = tuple[int, int]
"""(layer, expert)."""


class ExpertPolicy(ABC):
    """What a tier asks. Policies differ in their order and in what a touch means."""

    capacity: int

    @abstractmethod
    def touch(self, key: Key) -> bool:
        """Note that `key` is wanted now; whether it is held."""

    def admits(self, key: Key, busy: Container[Key] = ()) -> bool:
        """Whether taking `key` in is worth its upload and the loss of the victim.

        `insert` does not ask. It takes in what is not admitted too, wherever a victim is found.
        """
        return self.capacity > 0

    @abstractmethod
    def insert(self, key: Key, busy: Container[Key] = ()) -> Key | None:
        """Hold `key`; the victim that had to go, None while there is room or if it is held.

        Never evicts one of `busy`; ValueError, and nothing changed, if there is no other.
        """

    @abstractmethod
    def remove(self, key: Key) -> None:
        """Hold `key` no longer; KeyError if it is not held."""

    @abstractmethod
    def resize(self, capacity: int, busy: Container[Key] = ()) -> list[Key]:
        """Hold at most `capacity` from now on; the victims, first one first.

        Never evicts one of `busy`; ValueError, and nothing changed, if they are too many.
        """

    def end_of_step(self) -> None:  # noqa: B027
        """All layers of a step have asked: time passes, for those that count it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Key]:
        """The keys held, from first victim to last."""


class OneOrder(ExpertPolicy):
    """All held in one order of eviction, as iterating tells it."""

    def insert(self, key: Key, busy: Container[Key] = ()) -> Key | None:
        """Hold `key`; the first victim that is not busy makes room."""
        if key in self:
            return None
        victim = None
        if self._full:
            victim = self._victim(key, busy)
            if victim is None:
                raise ValueError(f"no room for {key}: none of the {len(self)} held may go")
            self.remove(victim)
        self._take(key)
        return victim

    def resize(self, capacity: int, busy: Container[Key] = ()) -> list[Key]:
        """Hold at most `capacity` from now on; the first victims go."""
        if capacity < 0:
            raise ValueError(f"a capacity cannot be {capacity}")
        surplus = max(0, len(self) - capacity)
        victims = list(islice((key for key in self if key not in busy), surplus))
        if len(victims) < surplus:
            raise ValueError(f"cannot shrink to {capacity}: more than that are in use")
        for victim in victims:
            self.remove(victim)
        self.capacity = capacity
        return victims

    @property
    def _full(self) -> bool:
        """Whether another one needs a victim."""
        return len(self) >= self.capacity

    def _victim(self, key: Key, busy: Container[Key]) -> Key | None:
        """The first victim for `key` that is not busy."""
        return next((held for held in self if held not in busy), None)

    @abstractmethod
    def _take(self, key: Key) -> None:
        """Hold `key`, for which there is room."""


class Lru(OneOrder):
    """The one not wanted for longest goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: OrderedDict[Key, None] = OrderedDict()  # a plain dict's head is slow to find

    def touch(self, key: Key) -> bool:
        """Note that `key` is wanted now; whether it is held."""
        if key not in self._held:
            return False
        self._held.move_to_end(key)
        return True

    def remove(self, key: Key) -> None:
        """Hold `key` no longer; KeyError if it is not held."""
        del self._held[key]

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def _take(self, key: Key) -> None:
        self._held[key] = None


class PerLayer(ExpertPolicy):
    """A quota and a policy for every layer: one layer's experts never push out another's.

    Layers come round in turn. What does not hold a whole round's experts, and goes by recency over
    all of them, evicts each expert shortly before its layer comes round again; quotas do not.
    """

    def __init__(
        self, capacity: int, layers: Collection[int], make: Callable[[int], ExpertPolicy]
    ) -> None:
        """`layers`: all that will ask, the first ones get what division leaves over.

        `make(quota)`: the policy of one layer.
        """
        self.capacity = capacity
        shares = _shares(capacity, len(layers))
        self._parts = {layer: make(n) for layer, n in zip(layers, shares, strict=True)}
        self._n = 0

    def touch(self, key: Key) -> bool:
        """Note that `key` is wanted now; whether it is held."""
        return self._parts[key[0]].touch(key)

    def admits(self, key: Key, busy: Container[Key] = ()) -> bool:
        """Whether its layer's policy does."""
        return self._parts[key[0]].admits(key, busy)

    def insert(self, key: Key, busy: Container[Key] = ()) -> Key | None:
        """Hold `key`; the victim of its layer that had to go."""
        part = self._parts[key[0]]
        before = len(part)
        victim = part.insert(key, busy)
        self._n += len(part) - before
        return victim

    def remove(self, key: Key) -> None:
        """Hold `key` no longer; KeyError if it is not held."""
        self._parts[key[0]].remove(key)
        self._n -= 1

    def resize(self, capacity: int, busy: Container[Key] = ()) -> list[Key]:
        """Share `capacity` out anew; the victims, the first of each layer first.

        ValueError, and nothing changed, if a layer has more `busy` ones than its new quota.
        """
        if capacity < 0:
            raise ValueError(f"a capacity cannot be {capacity}")
        quotas = _shares(capacity, len(self._parts))
        for part, quota in zip(self._parts.values(), quotas, strict=True):
            if len(part) > quota < sum(key in busy for key in part):
                raise ValueError(f"cannot shrink to {capacity}: a layer has more in use")
        lost = [p.resize(n, busy) for p, n in zip(self._parts.values(), quotas, strict=True)]
        self.capacity = capacity
        self._n -= sum(map(len, lost))
        return _in_turn(lost)

    def end_of_step(self) -> None:
        """Time passes for every layer."""
        for part in self._parts.values():
            part.end_of_step()

    def __len__(self) -> int:
        return self._n

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key in self._parts.get(key[0], ())

    def __iter__(self) -> Iterator[Key]:
        return iter(_in_turn(self._parts.values()))


def _in_turn(lists: Iterable[Iterable[Key]]) -> list[Key]:
    """The first of each, then the second of each, and so on."""
    return [key for row in zip_longest(*lists) for key in row if key is not None]


def _shares(capacity: int, n: int) -> list[int]:
    """`capacity` in `n` parts as equal as can be, the larger ones first."""
    return [capacity // n + (i < capacity % n) for i in range(n)]


class PinnedLru(OneOrder):
    """LRU beside a hot set that no insert evicts. Pinned ones come in by `insert` like others."""

    def __init__(self, capacity: int, pinned: Iterable[Key]) -> None:
        """`pinned`: the hottest first; only shrinking takes them, the least hot first."""
        self.capacity = capacity
        self._rank = {key: i for i, key in enumerate(pinned)}
        self._pinned: set[Key] = set()
        self._rest = Lru(capacity)

    def touch(self, key: Key) -> bool:
        """Note that `key` is wanted now; whether it is held."""
        return key in self._pinned or self._rest.touch(key)

    def admits(self, key: Key, busy: Container[Key] = ()) -> bool:
        """Whether the hot set leaves room for `key`."""
        return len(self._pinned) < self.capacity

    def remove(self, key: Key) -> None:
        """Hold `key` no longer; KeyError if it is not held."""
        if key in self._pinned:
            self._pinned.remove(key)
        else:
            self._rest.remove(key)

    def __len__(self) -> int:
        return len(self._pinned) + len(self._rest)

    def __contains__(self, key: object) -> bool:
        return key in self._pinned or key in self._rest

    def __iter__(self) -> Iterator[Key]:
        yield from self._rest
        yield from sorted(self._pinned, key=self._rank.__getitem__, reverse=True)

    def _victim(self, key: Key, busy: Container[Key]) -> Key | None:
        return next((held for held in self._rest if held not in busy), None)

    def _take(self, key: Key) -> None:
        if key in self._rank:
            self._pinned.add(key)
        else:
            self._rest._take(key)


_Score: TypeAlias = tuple[float, int, Key]
"""Aged count, time of the last touch, and whose they are: in order of eviction."""

_LARGEST: Final = 1e100
"""Weight of a touch at which all scores are scaled down: floats end at 1e308."""


class AgedFrequency(OneOrder):
    """The one wanted least often lately goes first (LFRU): counts that fade, recency breaks ties.

    A touch counts 1 and is worth half after `half_life` steps, also for keys that are not held:
    that is how a candidate earns its place. Made for slow admission: what comes in must have been
    wanted `margin` times as often as what goes, and `per_layer` may come in per layer and step.
    """

    def __init__(
        self,
        capacity: int,
        *,
        half_life: float = 32.0,
        margin: float = 1.0,
        per_layer: int | None = None,
    ) -> None:
        """`half_life` in steps; `per_layer` None: no limit."""
        self.capacity = capacity
        self.margin, self.per_layer = margin, per_layer
        # Instead of every score shrinking with time, a touch weighs more: one number changes.
        self._weight, self._growth = 1.0, 2.0 ** (1.0 / half_life)
        self._scores: dict[Key, _Score] = {}
        self._clock = 0
        self._held: set[Key] = set()
        self._heap: list[_Score] = []
        self._admitted: Counter[int] = Counter()

    def touch(self, key: Key) -> bool:
        """Count that `key` is wanted now, held or not; whether it is held."""
        self._clock += 1
        before = self._scores.get(key)
        count = self._weight if before is None else before[0] + self._weight
        self._scores[key] = (count, self._clock, key)
        return key in self._held

    def score(self, key: Key) -> float:
        """How often `key` was wanted, a touch of this step counting 1."""
        return self._scores[key][0] / self._weight if key in self._scores else 0.0

    def admits(self, key: Key, busy: Container[Key] = ()) -> bool:
        """Whether `key` beats the first victim by the margin and its layer may upload once more."""
        if self.per_layer is not None and self._admitted[key[0]] >= self.per_layer:
            return False
        if not self._full:
            return True
        victim = self._victim(key, busy)
        return victim is not None and self.score(key) > self.margin * self.score(victim)

    def remove(self, key: Key) -> None:
        """Hold `key` no longer, its score is kept; KeyError if it is not held."""
        self._held.remove(key)

    def end_of_step(self) -> None:
        """Everything counted so far fades a little."""
        self._admitted.clear()
        self._weight *= self._growth
        if self._weight > _LARGEST:
            self._scores = {k: (s / self._weight, t, k) for k, (s, t, _) in self._scores.items()}
            self._weight = 1.0
            self._rebuild()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted(self._held, key=self._scores.__getitem__))

    def _victim(self, key: Key, busy: Container[Key]) -> Key | None:
        """Smallest score first. An entry may lag behind its key's score, which only grows."""
        heap, put_back, found = self._heap, [], None
        while heap:
            entry = heap[0]
            held = entry[2]
            if held not in self._held:
                heapq.heappop(heap)
            elif entry is not (score := self._scores[held]):
                heapq.heapreplace(heap, score)
            elif held in busy:
                put_back.append(heapq.heappop(heap))
            else:
                found = held
                break
        for entry in put_back:
            heapq.heappush(heap, entry)
        return found

    def _take(self, key: Key) -> None:
        self._admitted[key[0]] += 1
        self._held.add(key)
        heapq.heappush(self._heap, self._scores.setdefault(key, (0.0, 0, key)))
        if len(self._heap) > 2 * len(self._held) + 64:  # removed and inserted again, many times
            self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [self._scores[key] for key in self._held]
        heapq.heapify(self._heap)
