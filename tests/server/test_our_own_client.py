"""`mimo chat --remote` asks `mimo serve`: the events of a local engine come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeEngine
from servers import serving, wait_until

from mimo_local.chat import Chat, Message, Piece, ask
from mimo_local.errors import MimoError
from mimo_local.events import Done, Failed, Prefill
from mimo_local.remote import Remote
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

KEY = "a-key"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(context_limit=5000)


@pytest.fixture
def remote(engine: FakeEngine) -> Iterator[Remote]:
    with serving(engine, keys=(KEY,)) as server:
        settings = Settings.resolve(env={}, remote=server.url)
        with Remote.open(settings, env={"MIMO_REMOTE_KEY": KEY}, pauses=(0.01,)) as found:
            yield found


def asked(remote: Remote, **chat: Any) -> list[Any]:
    talk = Chat([Message("user", "What is it?")], **chat)
    return list(ask(remote, None, talk, SamplingParams(seed=3, top_k=7)))


def texts(events: list[Any], kind: str) -> str:
    return "".join(e.text for e in events if isinstance(e, Piece) and e.kind == kind)


def test_the_same_events_come_back(remote: Remote, engine: FakeEngine) -> None:
    assert (remote.name, remote.context_limit, remote.counts_exactly) == ("fake", 5000, True)
    engine.queue("<think>", "why", "</think>", "A ", "thing.", reason="length")
    events = asked(remote, thinking=True)
    assert (texts(events, "thinking"), texts(events, "answer")) == ("why", "A thing.")
    assert any(isinstance(event, Prefill) and event.done < event.total for event in events)
    done = events[-1]
    assert isinstance(done, Done) and done.reason == "length"
    assert (done.stats.prompt_tokens, done.stats.completion_tokens) == (29, 5)
    params = engine.requests[-1].params
    assert (params.seed, params.top_k) == (3, 7)


def test_errors_come_back_as_errors(remote: Remote, engine: FakeEngine) -> None:
    engine.queue("some", error=MimoError("the disk is gone", hint="plug it in"))
    last = asked(remote)[-1]
    assert isinstance(last, Failed) and "disk is gone" in last.error.message


def test_a_cancel_arrives(remote: Remote, engine: FakeEngine) -> None:
    engine.queue("some", hold=True)
    reply = ask(remote, None, Chat([Message("user", "hi")]), SamplingParams())
    for event in reply:
        if isinstance(event, Piece):
            reply.cancel()

    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    wait_until(lambda: not any(name.startswith("mimo-answer") for name in names()))
