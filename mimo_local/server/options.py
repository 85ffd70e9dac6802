"""What a server may be told: where it listens, who may ask, how much and how long. Plain data.

Knows no engine and no request; `cli.serve` makes it, every part of the server reads it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from mimo_local.errors import UsageError
from mimo_local.sampler import SamplingParams


@dataclass(frozen=True, slots=True)
class Options:
    """All limits have a number; what is not allowed here is refused, never cut silently."""

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()
    """Any of them opens the server; none: everybody on this machine may ask."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may ask."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are taken beside this machine's own, on loopback."""
    aliases: tuple[str, ...] = ()
    """Further names the model answers to."""
    max_requests: int = 64
    """Answers being made or waiting at one time; one more is refused with 429."""
    max_connections: int = 512
    max_body: int = 16 << 20
    """Bytes of a request; a prompt of 262 144 tokens is about 1 MB."""
    max_waiting: int = 1 << 20
    """Bytes of an answer kept for a client that does not read; beyond that it is cancelled."""
    header_s: float = 15.0
    """Until a request's headers must have come."""
    body_s: float = 60.0
    """Until its body must have come."""
    idle_s: float = 60.0
    """How long a connection without a request is kept."""
    stall_s: float = 60.0
    """How long a client may take nothing of what waits for it."""
    ping_s: float = 10.0
    """At least this often something is sent to a client that waits."""
    grace_s: float = 5.0
    """How long answers may take to finish after Ctrl-C."""
    params: SamplingParams = field(default_factory=SamplingParams)
    """Of a request that does not say; `max_tokens` as below."""
    max_tokens: int | None = None
    """Longest answer of a request that does not say; None: as long as the context allows."""
    system: str = ""
    thinking: bool = False

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]").split("%")[0]).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """UsageError for what must not be served."""
        if not self.loopback and not self.keys:
            raise UsageError(
                f"everybody who can reach {self.host} could use this server",
                hint="set a key with --api-key-file FILE or MIMO_API_KEY, or keep --host 127.0.0.1",
            )
        if any(not key or not key.isascii() or key != key.strip() for key in self.keys):
            raise UsageError(
                "an API key is empty or holds spaces or letters beyond ASCII",
                hint="make one with `openssl rand -hex 32`",
            )
        if "*" in self.cors and not self.keys:
            raise UsageError(
                "with --cors '*' every web page you open could use this server",
                hint="name the page's origin, like --cors http://localhost:3000, or set a key",
            )
        for origin in self.cors:
            if origin not in ("*", "null") and "://" not in origin:
                raise UsageError(
                    f"`{origin}` is no origin", hint="an origin is like http://localhost:3000"
                )
