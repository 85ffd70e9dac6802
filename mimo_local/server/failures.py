"""Errors in OpenAI's shape: every status the server answers with, and what becomes of ours.

Knows no request and no route. Called by all of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from mimo_local.errors import (
    BusyError,
    CancelledError,
    ContextOverflowError,
    MimoError,
    NotEnoughMemoryError,
    TokenizerError,
    UsageError,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error: its status, and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def refuse(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code=code, param=param)


def unexpected(error: Exception) -> ApiError:
    """What nobody foresaw: its kind for the client, the rest is on stderr."""
    text = f"unexpected {type(error).__name__}: the server's own output says more"
    return ApiError(500, text, code="internal_error")


def of_mimo(error: MimoError, retry_after: int = 5) -> ApiError:
    """One of our own errors, with its hint."""
    text = f"{error.message.rstrip('.')}. Hint: {error.hint}"
    if isinstance(error, ContextOverflowError):
        return ApiError(400, text, code="context_length_exceeded", param="messages")
    if isinstance(error, (UsageError, TokenizerError)):  # a template refuses the messages
        return ApiError(400, text)
    if isinstance(error, BusyError):
        return ApiError(429, text, code="queue_full", headers={"Retry-After": str(retry_after)})
    if isinstance(error, (CancelledError, NotEnoughMemoryError)):
        code = "cancelled" if isinstance(error, CancelledError) else "out_of_memory"
        return ApiError(503, text, code=code, headers={"Retry-After": str(retry_after)})
    return ApiError(500, text, code="engine_error")


def of_validation(error: ValidationError) -> ApiError:
    """The first thing pydantic found wrong, named by its place in the request."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a field that may be several things, the deepest complaint is about the one that was meant.
    worst = max(found, key=lambda entry: len(entry["loc"]))
    place = ".".join(str(part) for part in worst["loc"])[:200]
    message = worst["msg"].removeprefix("Value error, ")
    if worst["type"] == "json_invalid":
        return refuse(f"the body is not valid JSON: {message}", code="invalid_json")
    return refuse(f"{place}: {message}" if place else message, place or None)
