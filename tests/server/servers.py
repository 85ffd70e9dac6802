"""A real server on a free port of this machine, in a thread, for tests: `with serving(engine)`.

The engine is mostly `FakeEngine`; the HTTP, the sockets and the event loop are the real ones.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mimo_local.events import Progress
from mimo_local.server.options import Options
from mimo_local.server.run import Running

PATIENCE_S = 30.0
"""Until a test gives up on something that must happen."""


class Serving(Running):
    """A running server and small ways to talk to it."""

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request: status, headers, body. `body`: JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, data, own | (headers or {}))
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        """One request: status and document."""
        status, _, data = self.call(method, path, body, **more)
        return status, json.loads(data)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)


@contextmanager
def serving(
    engine: Any,
    *,
    opener: Callable[[Callable[[Progress], None]], Any] | None = None,
    **options: Any,
) -> Iterator[Serving]:
    """A server that answers with `engine`; its end is part of the test."""
    options = {"port": 0, "grace_s": 0.2, **options}
    server = Serving(Options(**options), opener or (lambda tell: engine))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    try:
        if opener is None:
            wait_until(lambda: server.service.engine is not None)
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"
    if errors:
        raise errors[0]


def wait_until(true: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    """Look every few milliseconds; fail with what was waited for."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not: {true}"
        time.sleep(0.005)


def events(data: bytes) -> list[Any]:
    """The documents of a stream, [DONE] as text."""
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
