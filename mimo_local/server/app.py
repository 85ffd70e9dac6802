"""The ASGI app: routes, what guards them, errors in one shape, the model's life.

Knows every route by name and none by heart. Made by `run` and by the tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mimo_local.errors import MimoError
from mimo_local.server import chat_routes, routes
from mimo_local.server.failures import ApiError, of_mimo, unexpected
from mimo_local.server.guard import Guard
from mimo_local.server.service import Opener, Service

ROUTES: Final = (
    Route("/v1/chat/completions", chat_routes.chat_completions, methods=["POST"]),
    Route("/v1/chat/completions/input_tokens", chat_routes.count, methods=["POST"]),
    Route("/v1/completions", chat_routes.completions, methods=["POST"]),
    Route("/v1/models", routes.models, methods=["GET"]),
    Route("/v1/models/{model:path}", routes.model, methods=["GET"]),
    Route("/tokenize", routes.tokenize, methods=["POST"]),
    Route("/detokenize", routes.detokenize, methods=["POST"]),
    Route("/health", routes.health, methods=["GET"]),
    Route("/metrics", routes.metrics, methods=["GET"]),
    Route("/openapi.json", routes.schema, methods=["GET"]),
)


def make(service: Service, opener: Opener, on_failure: Callable[[], None]) -> Starlette:
    """The app; when it starts it begins to load the model, when it ends it frees it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.load(opener, on_failure)
        yield
        await service.close()

    middleware = [Middleware(Counted, service), Middleware(Guard, service.options)]
    if service.options.cors:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            ApiError: _refused,
            MimoError: _refused,
            HTTPException: _no_route,
            Exception: _unexpected,
        },
    )
    app.state.service = service
    return app


class Counted:
    """Counts requests by path and status; unknown paths are one."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._paths = {route.path for route in ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # gone before anything was sent

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, MimoError):
        error = of_mimo(error, request.app.state.service.retry_after)
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code)
    found = ApiError(error.status_code, text, code=code, headers=error.headers)
    return JSONResponse(found.body, found.status, found.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(unexpected(error).body, 500)
