"""One server's connections: sends, asks again while it is busy, turns refusals into errors.

Knows HTTP and no answer; called by `backend`, on its loop's thread. httpx2 (0.2 s) is imported when
a connection is made.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mimo_local import __version__
from mimo_local.errors import RemoteError, UsageError
from mimo_local.remote import failures, requests
from mimo_local.remote.answers import shown

if TYPE_CHECKING:
    import httpx2

CONNECT_S, SILENCE_S, SMALL_S = 10.0, 900.0, 15.0
"""To connect; between two bytes of an answer (a long prompt is read in silence); for all else."""
PAUSES_S: Final = (0.5, 2.0, 5.0)
"""Before asking again, while nothing has come; a Retry-After of up to LONGEST_PAUSE_S wins."""
LONGEST_PAUSE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and how."""

    address: str
    key: str = ""
    pauses: tuple[float, ...] = PAUSES_S
    silence_s: float = SILENCE_S

    @property
    def base(self) -> str:
        """Where the API is."""
        return requests.base(self.address)


class Refused(Exception):
    """The server does not know these fields."""

    def __init__(self, fields: frozenset[str]) -> None:
        super().__init__(", ".join(fields))
        self.fields = fields


class Connection:
    """`sent` for a response to read, `small` for a short one that is read and parsed."""

    def __init__(self, server: Server) -> None:
        self.url, self.model = server.address, ""
        self._server = server
        self._client = _client(server)

    async def close(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def small(
        self, method: str, url: str, json: Any = None, *, tries: int | None = None
    ) -> Any:
        """A request with a short answer, parsed."""
        try:
            async with asyncio.timeout(SMALL_S * (1 + len(self._server.pauses))):
                async with self.sent(method, url, json, tries, timeout=SMALL_S) as response:
                    data = failures.parsed(await response.aread())
        except TimeoutError:
            raise RemoteError(
                f"{self.url} takes too long to say what it has",
                hint="is the server still starting?",
            ) from None
        except Exception as error:
            raise failures.of_exception(error, self.url, begun=False) from error
        if not isinstance(data, dict):
            raise UsageError(
                f"{self.url} is no OpenAI-compatible server: it sent {shown(str(data), 80)}",
                hint="the address usually ends in /v1 or in nothing",
            )
        return data

    @asynccontextmanager
    async def sent(
        self,
        method: str,
        url: str,
        json: Any,
        tries: int | None,
        *,
        timeout: float | None = None,
        on_phase: Callable[[bool], None] = lambda connecting: None,
    ) -> AsyncIterator[httpx2.Response]:
        """A response that is a 200, asked for again while the server is busy or not there yet.

        `on_phase`: told whether a connection is being made.
        """
        import httpx2

        async def trace(name: str, _: object) -> None:
            if name == "connection.connect_tcp.started":
                on_phase(True)
            elif name.endswith(".send_request_headers.started"):
                on_phase(False)

        pauses = list(self._server.pauses if tries is None else self._server.pauses[:tries])
        while True:
            request = self._client.build_request(method, url, json=json)
            if timeout is not None:
                request.extensions["timeout"] = httpx2.Timeout(timeout).as_dict()
            request.extensions["trace"] = trace
            try:
                response = await self._client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                on_phase(False)
                if not pauses:
                    raise
                await asyncio.sleep(pauses.pop(0))
                continue
            try:
                if response.status_code == 200:
                    yield response
                    return
                pause = await self._refusal(response, json, pauses)
            finally:
                await response.aclose()
            await asyncio.sleep(pause)

    async def _refusal(self, response: httpx2.Response, json: Any, pauses: list[float]) -> float:
        """How long to wait before asking again; raises if that is no use."""
        status = response.status_code
        body = failures.parsed((await response.aread())[:100_000])
        wait = failures.retry_after(response.headers.get("retry-after"))
        if status in failures.AGAIN and pauses and (wait or 0) <= LONGEST_PAUSE_S:
            pause = pauses.pop(0)
            return pause if wait is None else wait
        if status in (400, 422) and isinstance(json, dict):
            said = str(body)
            fields = frozenset(n for n in requests.EXTRAS if n in json and n in said)
            if fields:
                raise Refused(fields)
        raise failures.of_status(
            status,
            body,
            self.url,
            key=self._server.key,
            model=self.model,
            wait=wait,
            to=response.headers.get("location", ""),
        )


def _client(server: Server) -> httpx2.AsyncClient:
    """Certificates are verified, redirects are not followed.

    Proxies of the environment (HTTPS_PROXY, NO_PROXY) count, but not for this machine itself.
    Keep-alive probes notice a server that vanished while nothing was sent. They are a mount, not
    the transport: with a transport of its own a client would not look for proxies.
    """
    import httpx2

    headers = {"User-Agent": f"mimo-local/{__version__}"}
    if server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    options: list[tuple[int, int, int]] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # Linux
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    proxied = not requests.is_loopback(server.address)
    trusted = httpx2.create_ssl_context()  # once: it takes 0.1 s
    return httpx2.AsyncClient(
        verify=trusted,
        headers=headers,
        timeout=httpx2.Timeout(CONNECT_S, read=server.silence_s, write=60.0, pool=None),
        follow_redirects=False,
        trust_env=proxied,
        mounts={"all://": httpx2.AsyncHTTPTransport(trusted, socket_options=options)},
    )
