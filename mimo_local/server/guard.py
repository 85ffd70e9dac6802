"""Who may ask: the Host and Origin headers, and the API key. Pure ASGI, before any route.

On loopback the Host header must name this machine: a web page whose name resolves to 127.0.0.1
(DNS rebinding) brings its own name. Requests of other pages carry an Origin and are refused unless
allowed. Knows no engine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mimo_local.server.failures import ApiError
from mimo_local.server.options import Options

OPEN_PATHS = ("/health",)
"""Answer without a key: they say nothing about anybody."""


class Guard:
    """The outermost layer but CORS."""

    def __init__(self, app: ASGIApp, options: Options) -> None:
        self._app, self._options = app, options
        self._keys = [key.encode() for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: refused here, or passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            reply = JSONResponse(error.body, error.status, error.headers)
            await reply(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        options = self._options
        host = headers.get("host", "")
        if options.loopback and not _is_here(host, (options.host, *options.allowed_hosts)):
            raise ApiError(
                403,
                f"the Host header is {host[:100]!r}, and this server is for its own machine only",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        allowed = origin is None or origin in options.cors or "*" in options.cors
        if not allowed and origin not in (f"http://{host}", f"https://{host}"):
            raise ApiError(
                403,
                f"web pages of {str(origin)[:100]!r} may not ask: start the server with --cors",
                code="origin_not_allowed",
            )
        if self._keys and path not in OPEN_PATHS:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._known(key.strip()):
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _known(self, key: str) -> bool:
        # All of them are compared, each in constant time.
        given = key.encode("utf-8", "replace")
        return True in [hmac.compare_digest(given, own) for own in self._keys]


def _is_here(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header (name or address, maybe a port) means this machine."""
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.rstrip(".")
    if name == "localhost" or name in {other.lower().strip("[]") for other in names}:
        return bool(name)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
