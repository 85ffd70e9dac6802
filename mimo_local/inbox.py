"""What waits for the engine's thread: requests and other work, bounded, in the order they came.

The one place where other threads meet the engine's. Knows no model; `engine` puts, `scheduler`
takes what it has room for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from mimo_local.errors import BusyError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from mimo_local.experts.meters import Meters
    from mimo_local.generate import Decoding
    from mimo_local.sampler import Constraint, SamplingParams
    from mimo_local.session import Session
    from mimo_local.stream import Stream, TextOutput

MOST_WAITING: Final = 64
"""Requests that wait at most: an hour's work, for a model that writes a few tokens a second."""

Fit: TypeAlias = Literal["now", "later", "block"]
"""What `Inbox.pop` does with an item: take it, leave it there, or leave all behind it as well."""


@dataclass(eq=False)
class Request:
    """One continuation that was asked for, and how far it has come."""

    stream: Stream
    session: Session | None
    """None: until its turn comes, when the engine gives it one of its own."""
    ids: list[int]
    params: SamplingParams
    text: TextOutput
    constraint: Constraint | None = None
    logprobs: int | None = None
    pooled: bool = False
    """Whether the session goes back to the engine's."""
    decoding: Decoding | None = None
    started: float = 0.0
    cached: int = 0
    tokens: int = 0
    first_token: float = 0.0
    reported: tuple[int, float] = field(default=(0, 0.0))
    meters: Meters | None = None
    """The experts' meters when the request's turn came."""
    alone: bool = True
    """Whether no other request ran meanwhile: what it took can be held against the plan."""


@dataclass(eq=False)
class Scoring:
    """Logits of a whole text that were asked for."""

    ids: list[int]
    future: Future[Tensor]


Item: TypeAlias = Request | Scoring


class Inbox:
    """A bounded queue from which not only the first item may be taken. For any thread."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self.most = most
        self.closing = False
        self._items: deque[Item] = deque()
        self._change = threading.Condition()
        self._poked = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Add an item; BusyError if too many wait already, UsageError if nobody will take it."""
        with self._change:
            if self.closing:
                raise UsageError("the engine is closed", hint="load the model again")
            if len(self._items) >= self.most:
                raise BusyError(
                    f"{self.most} requests are waiting for the model already",
                    hint="ask again when some of them are answered",
                )
            self._items.append(item)
            self._change.notify_all()

    def pop(self, fit: Callable[[Item], Fit]) -> Item | None:
        """The first item that fits now."""
        with self._change:
            for item in self._items:
                found = fit(item)
                if found == "now":
                    self._items.remove(item)
                    return item
                if found == "block":
                    return None
        return None

    def drop(self, stream: Stream) -> Request | None:
        """Take out the request of this stream, if it still waits; else wake the engine for it."""
        with self._change:
            for item in self._items:
                if isinstance(item, Request) and item.stream is stream:
                    self._items.remove(item)
                    return item
            self._poked = True
            self._change.notify_all()
        return None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until there is something to do: an item, a cancelled stream, the end. False: timeout."""
        with self._change:
            found = self._change.wait_for(
                lambda: bool(self._items) or self._poked or self.closing, timeout_s
            )
            self._poked = False
        return found

    def close(self) -> None:
        """Take nothing more; whoever waits is woken."""
        with self._change:
            self.closing = True
            self._change.notify_all()

    def rest(self) -> list[Item]:
        """All that is left, taken out."""
        with self._change:
            left = list(self._items)
            self._items.clear()
        return left
