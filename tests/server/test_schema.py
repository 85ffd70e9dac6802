"""/openapi.json: whatever fits it (and what does not) is answered as it says, never with a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fakes import FakeEngine
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import Serving, serving

from mimo_local.server.app import ROUTES
from mimo_local.server.openapi import document

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeEngine()) as running:
        yield running
        # Not everything was refused, and not everything was taken. No path by itself is sure of
        # both: hypothesis draws constants from whatever modules its process has loaded.
        figures = running.service.metrics.text().decode()
        paths = ("/v1/chat/completions", "/v1/completions", "/tokenize")
        for status in ("200", "400"):
            counted = [f'mimo_requests_total{{path="{path}",status="{status}"}}' for path in paths]
            assert any(line in figures for line in counted)


schema = schemathesis.openapi.from_dict(document())
schema.config.seed = 1
schema.config.generation = GenerationConfig(
    modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
)


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_schema_is_kept(case: schemathesis.Case, server: Serving) -> None:
    case.call_and_validate(base_url=server.url, checks=CHECKS)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "logprobs": 2, "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "logprobs": True,
                "stream_options": {"include_usage": True},
            },
        ),
    ],
)
def test_streams_keep_it_too(server: Serving, path: str, body: dict[str, Any]) -> None:
    case = schema[path]["POST"].Case(body={**body, "stream": True}, media_type="application/json")
    case.call_and_validate(base_url=server.url, checks=CHECKS)


def test_every_route_is_published(server: Serving) -> None:
    status, found = server.json("GET", "/openapi.json")
    assert status == 200 and found == json.loads(json.dumps(document()))
    routes = {route.path.replace(":path", "") for route in ROUTES} - {"/openapi.json"}
    assert set(found["paths"]) == routes
