"""From the engine's blocking streams to asyncio: a thread per stream, a bounded buffer between.

A thread waits for the next event and hands it to the loop; it ends with its stream, so that as many
threads live as answers are being made or wait their turn. What a client does not read collects up
to `max_waiting` bytes; beyond that the answer is cancelled, because neither the engine nor the
memory waits for somebody who does not read. Knows no HTTP. Made by `service`, read by `routes`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Final

from mimo_local.errors import MimoError
from mimo_local.events import Done, Event, Failed, Prefill, Token

if TYPE_CHECKING:
    from mimo_local.stream import Stream

EVENT_BYTES: Final = 200
"""What an event costs beside its text."""


class Feed:
    """Events of some streams with the stream's index; iterate it once, on the loop that made it."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        max_waiting: int,
        ping_s: float,
        on_event: Callable[[int, Event], None] = lambda index, event: None,
        on_end: Callable[[Feed], None] = lambda feed: None,
    ) -> None:
        """`on_event`, `on_end`: told of each event as it comes, and of the last thread's end."""
        self.overflowed = False
        """The client read too slowly, and the rest was given up."""
        self._state = ["waiting"] * len(streams)
        """Of each stream: waiting, running, ended."""
        self._streams = list(streams)
        self._max_waiting, self._ping_s = max_waiting, ping_s
        self._on_event, self._on_end = on_event, on_end
        self._events: deque[tuple[int, Event]] = deque()
        self._waiting = 0
        self._running = len(streams)
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for index, stream in enumerate(streams):
            name = f"mimo-answer-{index}"
            threading.Thread(
                target=self._pump, args=(index, stream), name=name, daemon=True
            ).start()

    def cancel(self, index: int | None = None) -> None:
        """End one stream or all; at once for those that wait, within one step for others."""
        for stream in self._streams if index is None else [self._streams[index]]:
            stream.cancel()

    def cancel_waiting(self) -> None:
        """End the streams whose turn has not come."""
        for index, state in enumerate(self._state):
            if state == "waiting":
                self.cancel(index)

    @property
    def open(self) -> int:
        """Streams that have not ended."""
        return len(self._state) - self._state.count("ended")

    @property
    def begun(self) -> int:
        """Streams whose turn has come and that have not ended."""
        return self._state.count("running")

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event] | None]:
        """The events; None whenever nothing came for `ping_s` seconds."""
        while self._events or self._running:
            if not self._events:
                self._more.clear()
                try:
                    async with asyncio.timeout(self._ping_s):
                        await self._more.wait()
                except TimeoutError:
                    yield None
                continue
            index, event = self._events.popleft()
            self._waiting -= _cost(event)
            yield index, event

    # ---- the threads' side -----------------------------------------------------------------------

    def _pump(self, index: int, stream: Stream) -> None:
        try:
            try:
                for event in stream:
                    self._loop.call_soon_threadsafe(self._put, index, event)
            except RuntimeError as error:
                if self._loop.is_closed():
                    stream.cancel()
                    return
                self._loop.call_soon_threadsafe(self._put, index, _failed(error))
            except Exception as error:
                self._loop.call_soon_threadsafe(self._put, index, _failed(error))
            self._loop.call_soon_threadsafe(self._ended)
        except RuntimeError:  # the loop was closed in between: nobody is there to be told
            stream.cancel()

    def _put(self, index: int, event: Event) -> None:
        self._state[index] = "ended" if isinstance(event, (Done, Failed)) else "running"
        self._on_event(index, event)
        if self._waiting > self._max_waiting and isinstance(event, Token):
            if not self.overflowed:
                self.overflowed = True
                self.cancel()
            return
        late = isinstance(event, Prefill) and len(self._events) > 8
        if late and self._events[-1][0] == index and isinstance(self._events[-1][1], Prefill):
            self._events[-1] = index, event  # only the newest matters to who comes late
            return
        self._waiting += _cost(event)
        self._events.append((index, event))
        self._more.set()

    def _ended(self) -> None:
        self._running -= 1
        self._more.set()
        if not self._running:
            self._on_end(self)


def _cost(event: Event) -> int:
    if not isinstance(event, Token):
        return EVENT_BYTES
    return EVENT_BYTES + len(event.text) + 32 * len(event.top)


def _failed(error: Exception) -> Failed:
    wrapped = MimoError(f"the answer failed: {type(error).__name__}: {error}", hint="ask again")
    wrapped.__cause__ = error
    return Failed(wrapped if not isinstance(error, MimoError) else error)
