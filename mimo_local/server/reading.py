"""Reading a request's body: its kind, its size, its time, then pydantic.

Knows no route. Called by all routes that take a body.
"""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from mimo_local.server.failures import ApiError, of_validation
from mimo_local.server.service import Service

DISCARDED: Final = 64 << 20
"""Bytes too many that are still read, and dropped: many clients read no answer before they have
sent everything, and would report a broken connection instead of what was wrong."""
AT_ONCE: Final = 8
"""Bodies of the largest size that may be on their way at one time: 128 MB by default."""
_M = TypeVar("_M", bound=BaseModel)


async def read(request: Request, model: type[_M]) -> _M:
    """The body as `model`; ApiError 400, 408, 413, 415."""
    service: Service = request.app.state.service
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps foreign web pages out: this kind makes browsers ask for leave first.
        raise ApiError(
            415,
            f"the body is {kind or 'of no kind'}: send it with `Content-Type: application/json`",
            code="unsupported_media_type",
        )
    data = await _body(request, service)
    return await service.work(lambda: _parsed(data, model))


async def _body(request: Request, service: Service) -> bytes:
    most, seconds = service.options.max_body, service.options.body_s
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most + DISCARDED:
        raise _too_large(most)
    parts, size, held = [], 0, 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most + DISCARDED:
                    raise _too_large(most)
                if size <= most:
                    parts.append(part)
                    held += len(part)
                    service.reading += len(part)
                    if service.reading > AT_ONCE * most:
                        raise _too_many(service)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {seconds:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the body was not sent to its end") from None
    finally:
        service.reading -= held
    if size > most:
        raise _too_large(most)
    return b"".join(parts)


def _too_many(service: Service) -> ApiError:
    return ApiError(
        429,
        "too many large requests are being sent at once",
        code="too_much_at_once",
        headers={"Retry-After": str(service.retry_after), "Connection": "close"},
    )


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {most / 1e6:.1f} MB",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _parsed(data: bytes, model: type[_M]) -> _M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise of_validation(error) from None
