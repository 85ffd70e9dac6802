"""uvicorn's connections and server with what they lack: time limits, an orderly way to stop.

A connection must send its headers in time, and must take what is written to it: one that stalls is
cut off, also when its answer is long complete. Knows no route and no engine.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mimo_local.server.failures import ApiError
from mimo_local.server.options import Options


class Connection(H11Protocol):
    """One client. `sweep` is called about once a second."""

    options = Options()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        self._since = self._progress = time.monotonic()
        self._size, self._asked = 0, False
        if len(self.connections) > self.options.max_connections:
            transport.abort()

    def on_response_complete(self) -> None:
        """The next request may come on the same connection."""
        self._since, self._asked = time.monotonic(), True
        super().on_response_complete()

    def sweep(self, now: float) -> None:
        """Cut the connection off if it has stalled."""
        size = self.transport.get_write_buffer_size()
        if not size or size < self._size:
            self._progress = now
        self._size = size
        stalled = now - self._progress > self.options.stall_s
        if stalled or self._waits_too_long(now):
            self.transport.abort()

    def _waits_too_long(self, now: float) -> bool:
        """Whether the next request's headers should have come."""
        if self.conn.their_state is not h11.IDLE:
            return False
        if not self._asked:
            return now - self._since > self.options.header_s
        # uvicorn's own timer runs only until the first byte of the next request.
        limit = self.options.idle_s + self.options.header_s
        return self.cycle.response_complete and now - self._since > limit

    def send_400_response(self, msg: str) -> None:
        """A request that is no HTTP, answered in the shape of all other errors."""
        body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of another answer
            return
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Stops without raising, and says when it begins to."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None], grace_s: float) -> None:
        super().__init__(config)
        self._on_exit, self._grace_s = on_exit, grace_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.sweep(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop accepting, tell, wait for the answers that are being made."""
        self._on_exit()
        loop = asyncio.get_running_loop()
        # Who has not taken its answer by then (a second behind the grace) will not.
        cut = loop.call_later(self._grace_s + 1, self._cut_all)
        await super().shutdown(sockets)
        cut.cancel()

    def _cut_all(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First Ctrl-C: stop; second one: at once. uvicorn would raise them again at the end."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
