"""In which order layers are converted and files fetched, what that takes of disk and of time.

Pure: sizes and names in, numbers out. Knows no network and no disk. Called by `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

HELD: Final = 7_500_000_000
"""Bytes of source files on the disk at a time, unless a single layer needs more: one layer of the
real model (6.5 GB) and the beginning of the next."""


@dataclass(frozen=True, slots=True)
class Step:
    """One file of the pack and the source files it is made of; `weight`: its share of the work."""

    name: str
    needs: frozenset[str]
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """What comes when: steps in order, files in order, bytes on the disk that suffice."""

    steps: tuple[Step, ...]
    files: tuple[str, ...]
    peak: int
    """Most bytes of source files that steps need at once."""

    @property
    def budget(self) -> int:
        """Bytes of source files allowed on the disk at a time."""
        return max(HELD, self.peak)


def arrange(steps: Sequence[Step], sizes: Mapping[str, int]) -> Order:
    """The order of `steps` that keeps fewest bytes: as given, or greedy if that is better."""
    found = [_order(tuple(way), sizes) for way in (steps, _greedy(steps, sizes))]
    return min(found, key=lambda order: order.peak)  # the first of equals: as given


def seconds(order: Order, sizes: Mapping[str, int], rate: float, work_rate: float) -> float:
    """How long fetching at `rate` bytes/s and converting at `work_rate` take beside each other.

    Fetching waits for room, converting for files: the same rules `fetch` and `run` follow.
    """
    left = _uses(order.steps)
    ends: list[tuple[int, float]] = [(0, 0.0)]  # bytes taken away so far, and when
    here: dict[str, float] = {}
    clock, position, freed = 0.0, 0, 0
    coming = iter(order.files)
    for step in order.steps:
        while step.needs - here.keys():
            file = next(coming)
            position += sizes[file]
            freeing = next(i for i, (n, _) in enumerate(ends) if position - n <= order.budget)
            clock += sizes[file] / rate
            if freeing:  # its end waits for that step, what fits before comes before
                late = min(sizes[file], position - ends[freeing - 1][0] - order.budget)
                clock = max(clock, ends[freeing][1] + late / rate)
            here[file] = clock
        begin = max([ends[-1][1], *(here[file] for file in step.needs)])
        for file in step.needs:
            left[file] -= 1
            freed += 0 if left[file] else sizes[file]
        ends.append((freed, begin + step.weight / work_rate))
    return max(ends[-1][1], clock)


def _uses(steps: Sequence[Step]) -> dict[str, int]:
    """File -> steps that need it."""
    uses: dict[str, int] = {}
    for step in steps:
        for file in step.needs:
            uses[file] = uses.get(file, 0) + 1
    return uses


def _order(steps: tuple[Step, ...], sizes: Mapping[str, int]) -> Order:
    left, held, peak = _uses(steps), 0, 0
    files: list[str] = []
    for step in steps:
        new = sorted(step.needs - set(files))
        files += new
        held += sum(sizes[file] for file in new)
        peak = max(peak, held)
        for file in step.needs:
            left[file] -= 1
            held -= 0 if left[file] else sizes[file]
    return Order(steps, tuple(files), peak)


def _greedy(steps: Sequence[Step], sizes: Mapping[str, int]) -> list[Step]:
    """Always the steps after which the fewest bytes stay, then those that add the fewest.

    Steps of the same files are done together: V2.6 has 3000 steps and 65 files.
    """
    left, here = _uses(steps), set[str]()
    waiting: dict[frozenset[str], list[Step]] = {}
    for step in steps:
        waiting.setdefault(step.needs, []).append(step)
    ordered = list[Step]()
    while waiting:

        def cost(needs: frozenset[str], here: set[str] = here) -> tuple[int, int]:
            new = sum(sizes[file] for file in needs - here)
            last = len(waiting[needs])
            return new - sum(sizes[file] for file in needs if left[file] == last), new

        best = min(waiting, key=cost)
        done = waiting.pop(best)
        ordered += done
        here |= best
        for file in best:
            left[file] -= len(done)
    return ordered
