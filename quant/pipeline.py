"""Work beside the work: what comes next is read, and what is done is put away, in other threads.

Order is kept and memory bounded: a fixed number of pieces is under way. Knows no tensors' meaning
and no files. Called by `convert` (reading ahead) and `writer` (hashing and writing behind).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Generic, TypeVar

from quant.tensorfile import Scratch

T = TypeVar("T")

DEPTH = 4
"""Reads under way: an NVMe disk needs several at once to reach its rate."""
BEHIND = 2
"""Pieces that may wait to be put away; their memory must stay as it is until then."""


def ahead(tasks: Iterable[Callable[[Scratch], T]], depth: int = DEPTH) -> Generator[T, None, None]:
    """Results in order, each valid until the next one is asked for; `depth` are under way.

    A task's error is raised in its place. Close the iterator to stop early.
    """
    pool = ThreadPoolExecutor(depth, "read-ahead")
    under_way: deque[Future[T]] = deque()
    try:
        for task, room in zip(tasks, cycle([Scratch() for _ in range(depth)]), strict=False):
            if len(under_way) == depth:
                yield under_way.popleft().result()
            under_way.append(pool.submit(task, room))  # in the room of what was used up just now
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Behind(Generic[T]):
    """Does several things with one piece after the other, each kind of thing in its own thread."""

    def __init__(self, *kinds: Callable[[T], None]) -> None:
        self._kinds = kinds
        self._lanes = [ThreadPoolExecutor(1, "write-behind") for _ in kinds]
        self._pieces: deque[list[Future[None]]] = deque()

    def put(self, piece: T) -> None:
        """Queue a piece; afterwards at most BEHIND wait, so earlier pieces' memory is free again.

        Raises what an earlier piece failed with.
        """
        pairs = zip(self._lanes, self._kinds, strict=True)
        self._pieces.append([lane.submit(kind, piece) for lane, kind in pairs])
        self._wait(BEHIND)

    def finish(self) -> None:
        """Wait for all pieces; raises what one of them failed with."""
        self._wait(0)

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)

    def _wait(self, left: int) -> None:
        while len(self._pieces) > left:
            for done in self._pieces.popleft():
                done.result()
