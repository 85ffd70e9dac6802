"""The window with a model on a server: what it says first, an answer, a stop, a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import pytest
from endpoint import SHAPES, Endpoint, Reply, chunk, sse
from stage import Stage, staged

from mimo_local.remote import Remote
from mimo_local.settings import Settings
from tui.widgets.transcript import ErrorBox


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint


def window(server: Endpoint) -> AbstractAsyncContextManager[Stage]:
    settings = Settings.resolve(env={}, remote=server.url)
    return staged(
        None,
        factory=lambda on_event: Remote.open(settings, on_event, env={}, pauses=()),
    )


async def test_it_says_where_texts_go_and_answers(server: Endpoint) -> None:
    server.chat(Reply([SHAPES["vllm"]]))
    async with window(server) as stage:
        glass = stage.text()
        assert f"is sent to {server.url}" in glass
        assert "stays on this machine" not in glass
        assert glass.splitlines()[0].endswith("remote")
        await stage.ask("What is it?")
        assert "Forty-two 答." in stage.text()
        await stage.send("/stats")
        await stage.until(lambda: "16 from cache" in stage.text())
        assert f"remote {server.url}" in stage.text().split("/stats")[0]


async def test_what_the_server_did_unasked_is_said(server: Endpoint) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}, "content_filter"))]))
    async with window(server) as stage:
        await stage.ask("hi")
        await stage.until(lambda: "content filter" in stage.text())


async def test_esc_stops_before_the_first_byte(server: Endpoint) -> None:
    server.chat(Reply(stall="before"))
    async with window(server) as stage:
        await stage.send("hi")
        await stage.until(server.stalled.is_set)
        started = time.monotonic()
        await stage.pilot.press("escape")
        await stage.until(server.gone.is_set)
        await stage.idle()
        assert time.monotonic() - started < 3


async def test_a_failure_is_shown_and_keeps_the_prompt(server: Endpoint) -> None:
    server.chat(Reply.json({"error": {"message": "worker died"}}, 500))
    async with window(server) as stage:
        await stage.ask("a long question")
        assert stage.screen.query(ErrorBox)
        assert "worker died" in stage.text()
        assert "a long question" in stage.screen.prompt.text


async def test_a_server_that_is_no_api_leaves_a_window_that_says_so(server: Endpoint) -> None:
    server.answer("/v1/models", Reply([b"<html>"], kind="text/html"))
    settings = Settings.resolve(env={}, remote=server.url)
    opened = staged(
        None,
        ready=False,
        factory=lambda on_event: Remote.open(settings, on_event, env={}, pauses=()),
    )
    async with opened as stage:
        await stage.until(lambda: stage.screen.state == "failed")
        assert "no OpenAI-compatible server" in stage.text().replace("\n", " ")
