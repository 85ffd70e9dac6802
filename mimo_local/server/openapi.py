"""/openapi.json: the published schema, made from the models that requests are parsed with.

Knows the routes by name. Called by `routes` and the tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mimo_local import __version__
from mimo_local.server import replies, schemas

REF: Final = "#/components/schemas/"
# path, method, what it does, body, answer, statuses of errors
ROUTES: Final[
    tuple[tuple[str, str, str, type[BaseModel] | None, type[BaseModel] | None, str], ...]
] = (
    ("/v1/chat/completions", "post", "answer a conversation",
     schemas.ChatRequest, replies.ChatReply, "400 404 408 413 415 429 500 503"),
    ("/v1/chat/completions/input_tokens", "post", "count a conversation's tokens",
     schemas.ChatRequest, replies.InputTokens, "400 404 408 413 415 429 500 503"),
    ("/v1/completions", "post", "continue a text",
     schemas.CompletionRequest, replies.CompletionReply, "400 404 408 413 415 429 500 503"),
    ("/v1/models", "get", "list the model", None, replies.ModelList, "503"),
    ("/v1/models/{model}", "get", "one model", None, replies.Model, "404 503"),
    ("/tokenize", "post", "ids of a text",
     schemas.TokenizeRequest, replies.Tokens, "400 408 413 415 429 503"),
    ("/detokenize", "post", "text of ids",
     schemas.DetokenizeRequest, replies.Content, "400 408 413 415 429 503"),
    ("/health", "get", "whether the model can answer", None, replies.Health, ""),
    ("/metrics", "get", "figures for Prometheus", None, None, ""),
)  # fmt: skip
EVERYWHERE: Final = "401 403"
STREAMS: Final[dict[str, type[BaseModel]]] = {
    "/v1/chat/completions": replies.ChatChunk,
    "/v1/completions": replies.CompletionChunk,
}
"""What the events of a stream hold, but for errors and the last one, `[DONE]`."""


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    models: dict[type[BaseModel], str] = {replies.ErrorReply: "serialization"}
    for _, _, _, body, answer, _ in ROUTES:
        models |= {body: "validation"} if body else {}
        models |= {answer: "validation"} if answer else {}
    models |= dict.fromkeys([*STREAMS.values(), replies.NotReady], "validation")
    _, found = models_json_schema(
        [(model, "validation") for model in models], ref_template=REF + "{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for path, method, summary, body, answer, statuses in ROUTES:
        paths.setdefault(path, {})[method] = _operation(path, summary, body, answer, statuses)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mimo-local", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(
    path: str,
    summary: str,
    body: type[BaseModel] | None,
    answer: type[BaseModel] | None,
    statuses: str,
) -> dict[str, Any]:
    kind = "application/json"
    good: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        good = {kind: {"schema": _ref(answer)}}
    if path in STREAMS:
        # `[DONE]` is no JSON, so the content cannot be given as a contentSchema.
        kind_of = f"a {STREAMS[path].__name__} as JSON, an ErrorReply, or at last [DONE]"
        event = {"type": "string", "description": kind_of}
        good["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": event}, "required": ["data"]}
        }
    error = {kind: {"schema": _ref(replies.ErrorReply)}}
    responses: dict[str, Any] = {"200": {"description": "done", "content": good}}
    for status in f"{statuses} {EVERYWHERE}".split():
        responses[status] = {"description": "an error", "content": error}
    if path == "/health":
        loading = {kind: {"schema": _ref(replies.NotReady)}}
        responses["503"] = {"description": "the model is loading", "content": loading}
    made: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").translate({123: None, 125: None}),
        "responses": responses,
    }
    if "{model}" in path:
        made["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if body is not None:
        made["requestBody"] = {"required": True, "content": {kind: {"schema": _ref(body)}}}
    return made


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF + model.__name__}
