"""Runs the server in this thread until it is stopped: socket, uvicorn, the model behind it.

`serve` is the one entry, called by `mimo serve`; tests run `Running` beside themselves.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Final

import uvicorn

from mimo_local.errors import UsageError
from mimo_local.server.app import make
from mimo_local.server.connection import Connection, Server
from mimo_local.server.options import Options
from mimo_local.server.service import Opener, Service

BACKLOG: Final = 256
AFTER_GRACE_S: Final = 10
"""Seconds for answers that were cancelled at the end of the grace to say so."""


class Running:
    """A server with its socket bound; `run` serves until `stop`, or a signal."""

    def __init__(self, options: Options, opener: Opener) -> None:
        options.check()
        self.options = options
        self.socket = bind(options)
        self.service = Service(options, lambda: len(self._server.server_state.connections))
        connection = type("Connection", (Connection,), {"options": options})
        config = uvicorn.Config(
            make(self.service, opener, self.stop),
            http=connection,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(options.idle_s),
            timeout_graceful_shutdown=int(options.grace_s) + AFTER_GRACE_S,
            backlog=BACKLOG,
        )
        self._server = Server(config, self.service.stop, options.grace_s)
        # uvicorn's notes are not for people; what went wrong is, and goes to stderr.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until stopped; raises what kept the model from loading."""
        try:
            self._server.run([self.socket])
        finally:
            self.socket.close()
        if self.service.error is not None and self._server.should_exit:
            raise self.service.error

    def stop(self) -> None:
        """Begin to stop; from any thread."""
        self._server.should_exit = True


def bind(options: Options) -> socket.socket:
    """The listening socket; UsageError says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host.strip("[]"), options.port, type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]  # fmt: skip
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)  # who asks from now on is answered, if a little later
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {options.host} port {options.port}: {error}",
            hint="another server may be there already: choose another --port",
        ) from error
    return listening


def serve(options: Options, opener: Opener, on_start: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `on_start` is told the address."""
    running = Running(options, opener)
    on_start(running.url)
    running.run()
