"""The small routes: what is served, how it is, tokens counted, the schema.

Each translates one call. Called by `app`.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_local import __version__
from mimo_local.engine import Engine
from mimo_local.server.failures import ApiError, refuse
from mimo_local.server.openapi import document
from mimo_local.server.reading import read
from mimo_local.server.schemas import DetokenizeRequest, TokenizeRequest
from mimo_local.server.service import Service
from mimo_local.tokenizer import Tokenizer


async def health(request: Request) -> Response:
    """GET /health: 200 when the model can answer, else 503 with how far it is."""
    service: Service = request.app.state.service
    try:
        engine = service.ready()
    except ApiError as error:
        now = service.progress
        loading = {
            "status": "stopping" if service.stopping else "loading",
            "stage": now.stage if now else "",
            "done": now.done if now else 0,
            "total": now.total if now else 0,
            "unit": now.unit if now else "",
        }
        return JSONResponse(error.body | loading, 503, {"Retry-After": "5"})
    return JSONResponse(
        {
            "status": "ok",
            "model": engine.name,
            "running": service.running,
            "waiting": service.active - service.running,
        }
    )


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    service: Service = request.app.state.service
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(service.metrics.text(), media_type=kind)


async def models(request: Request) -> Response:
    """GET /v1/models: the one there is, under all its names."""
    service: Service = request.app.state.service
    names = (service.ready().name, *service.options.aliases)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    service: Service = request.app.state.service
    name = request.path_params["model"]
    service.knows(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, object]:
    engine = service.ready()
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mimo-local",
        "description": engine.description,
        "context_length": engine.context_limit,
        "version": __version__,
    }


async def tokenize(request: Request) -> Response:
    """POST /tokenize: a text's ids. Control tokens in it stay text."""
    service: Service = request.app.state.service
    tokenizer = _tokenizer(service.ready())
    body = await read(request, TokenizeRequest)
    return JSONResponse({"tokens": await service.work(lambda: tokenizer.encode(body.content))})


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of ids, control tokens shown."""
    service: Service = request.app.state.service
    engine = service.ready()
    tokenizer = _tokenizer(engine)
    body = await read(request, DetokenizeRequest)
    wrong = next((i for i in body.tokens if i >= engine.config.vocab_size), None)
    if wrong is not None:
        raise refuse(f"token id {wrong} is outside the vocabulary", "tokens")
    text = await service.work(
        lambda: b"".join(map(tokenizer.bytes_of, body.tokens)).decode("utf-8", "replace")
    )
    return JSONResponse({"content": text})


def _tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise refuse(f"{engine.name} has no tokenizer files")
    return engine.tokenizer


async def schema(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(document())
