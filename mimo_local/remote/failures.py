"""What went wrong with a server, in the user's terms: one error with the next step as its hint.

Knows status codes and httpx2's exceptions; called by `backend`. Nothing a server says reaches the
terminal unshortened, and a key never does.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from mimo_local.errors import ContextOverflowError, MimoError, RemoteError, UsageError
from mimo_local.remote.answers import reported, shown

AGAIN = frozenset({429, 502, 503, 504})
"""Worth asking again: the server is busy, or still loading its model."""
TOO_LONG = re.compile(
    r"context[_ ](length|size|window)|maximum (context|model) length|longer than the model|"
    r"exceed\w* (the )?(available )?context",
    re.IGNORECASE,
)


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds a Retry-After header asks for, as a number or a date; None if it says nothing."""
    if not value:
        return None
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def parsed(body: bytes) -> Any:
    """The body of an error: JSON if it is, else its text."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def of_status(
    status: int, body: Any, where: str, *, key: str, model: str, wait: float | None, to: str
) -> MimoError:
    """The error for an answer that is no 200. `to`: where a redirect points."""
    said = reported(body).replace(key, "***") if key else reported(body)
    said = f": {said}" if said and said != '""' else ""
    if 300 <= status < 400:
        return RemoteError(
            f"{where} redirects to {shown(to) or 'somewhere else'}, which is not followed",
            hint="give that address with --remote if you trust it",
        )
    if status in (401, 403):
        given = "the key in MIMO_REMOTE_KEY" if key else "no key (MIMO_REMOTE_KEY is not set)"
        return UsageError(
            f"{where} does not accept {given}{said}", hint="set MIMO_REMOTE_KEY to one it knows"
        )
    if status == 404:
        return UsageError(
            f"{where} has no such model or page ({model or 'no model'}){said}",
            hint="--remote-model names the model; the address usually ends in /v1 or in nothing",
        )
    if status in (400, 413, 422) and (status == 413 or TOO_LONG.search(said)):
        return ContextOverflowError(
            f"the prompt is too long for {where}{said}",
            hint="shorten it, use a smaller --max-tokens, or use `mimo summarize`",
        )
    if status == 429:
        later = f" for another {wait:.0f} s" if wait else ""
        return RemoteError(
            f"{where} is busy{later}, or the limit of its key is reached{said}",
            hint="ask again later",
        )
    if status == 503:
        return RemoteError(
            f"{where} is not ready (503){said}", hint="it may still be loading its model: try later"
        )
    if status >= 500:
        return RemoteError(
            f"{where} failed ({status}){said}", hint="ask again; the server's log says more"
        )
    return RemoteError(f"{where} refused the request ({status}){said}", hint="see docs/cluster.md")


def of_exception(error: Exception, where: str, *, begun: bool) -> MimoError:
    """The error for a connection that could not be made, or broke."""
    import httpx2

    if isinstance(error, MimoError):
        return error
    said = f": {shown(str(error))}" if str(error) else f": {type(error).__name__}"
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError | httpx2.ProxyError):
        if "CERTIFICATE" in str(error).upper():
            return RemoteError(
                f"the certificate of {where} is not trusted{said}",
                hint="SSL_CERT_FILE can name your own authority's certificate",
            )
        return RemoteError(
            f"{where} cannot be reached{said}",
            hint="is the server running, and the address right? --remote off does without it",
        )
    if isinstance(error, httpx2.TimeoutException):
        return RemoteError(
            f"{where} has sent nothing for too long", hint="ask again; is the server still running?"
        )
    if isinstance(error, httpx2.TransportError):
        what = "broke off the answer" if begun else "broke the connection"
        return RemoteError(f"{where} {what}{said}", hint="ask again; the server's log says more")
    if isinstance(error, httpx2.InvalidURL):
        return UsageError(f"{where} is no address{said}", hint="like http://10.0.0.5:8000")
    return RemoteError(
        f"asking {where} failed{said}", hint="ask again; if it happens twice, report it"
    )
