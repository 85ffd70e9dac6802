"""Server-sent events: lines, and a response that ends the work as soon as the client is gone.

Knows no engine; `routes` gives it lines and what to do at the end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
"""The last line of OpenAI's streams."""


def data(document: Mapping[str, Any]) -> bytes:
    """One event. JSON has no line breaks of its own, so one line is enough."""
    return b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def comment(text: str) -> bytes:
    """A line clients skip: it says how far the work is and keeps the connection alive."""
    return f": {text}\n\n".encode()


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Lines as they come; `close` is called when they end, and when nobody reads them any more."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._close = lines, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the lines end or the client is gone."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            gone.cancel()
            if not sending.done():
                sending.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
                # `send` does not wait while there is room: let others in, and the goodbye.
                await asyncio.sleep(0)
        except Exception:  # the client has been told; the body has an end all the same
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})
