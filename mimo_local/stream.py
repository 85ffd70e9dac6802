"""What one request gives back: its events in order, its text with stop texts watched for.

Knows no model and no thread but the two ends of its queue. The engine fills a `Stream`, whoever
asked iterates it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Final, Protocol

from mimo_local.events import Done, Event, Failed

NO_ID: Final = -1
"""Id of a last Token event that only carries text held back until the end."""


class Stream:
    """The events of one request, in order: Prefill*, Token*, then one Done or Failed.

    Iterate it once, from one thread; `cancel` from any. `seed` makes the same answer again.
    """

    def __init__(self, seed: int, cancel: Callable[[Stream], None]) -> None:
        self.seed = seed
        self.cancelled = threading.Event()
        self._cancel = cancel
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ended = False

    def cancel(self) -> None:
        """End the answer within one step; what was made is kept. Twice is once."""
        self.cancelled.set()
        self._cancel(self)

    def put(self, event: Event) -> None:
        """Add an event; the engine's side."""
        self._events.put(event)

    @property
    def unread(self) -> int:
        """Events nobody has taken yet, about."""
        return self._events.qsize()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        self._ended = isinstance(event, (Done, Failed))
        return event


class Decoder(Protocol):
    """Ids to text, one at a time: a tokenizer's `stream()`."""

    def push(self, token: int) -> str:
        """The text this id completes."""

    def flush(self) -> str:
        """The rest, at the end."""


class TextOutput:
    """Ids to text, ending before a stop text; a possible beginning of one is held back."""

    def __init__(self, decoder: Decoder | None, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop text has come)."""
        if self._decoder is None:
            return "", False
        return self._pass(self._decoder.push(token))

    def flush(self) -> str:
        """The rest: what was held back, unless a stop text ended it."""
        if self._decoder is None or self._stopped:
            return ""
        text, stopped = self._pass(self._decoder.flush())
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _pass(self, piece: str) -> tuple[str, bool]:
        text = self._held + piece
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)], True
        longest = max((len(s) for s in self._stop), default=1) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
