"""A server instead of a local engine: every shape of stream, every way it can fail, every cut."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from endpoint import MODELS, SHAPES, Endpoint, Reply, chunk, sse, usage
from hypothesis import given
from hypothesis import strategies as st

from mimo_local.chat import Attachment, Chat, Message, Piece, ToolCall, ask
from mimo_local.errors import ContextOverflowError, MimoError, RemoteError, UsageError
from mimo_local.events import Done, Failed, Prefill, Stats
from mimo_local.remote import Remote, connection, failures, requests
from mimo_local.remote.answers import Reading
from mimo_local.remote.counting import RemoteTokenizer, estimate
from mimo_local.remote.sse import LONGEST, EventStream, Sent
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

OK = Reply([sse(chunk({"content": "fine"}, "stop"))])


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint


def connected(server: Endpoint, *, key: str = "", **settings: Any) -> Remote:
    found = Settings.resolve(env={}, remote=server.url, **settings)
    return Remote.open(found, env={"MIMO_REMOTE_KEY": key}, pauses=(0.01, 0.01))


@pytest.fixture
def remote(server: Endpoint) -> Iterator[Remote]:
    with connected(server) as found:
        yield found


def asked(remote: Remote, text: str = "What is it?", **chat: Any) -> list[Any]:
    """All events of an answer."""
    talk = Chat([Message("user", text)], **chat)
    return list(ask(remote, None, talk, SamplingParams()))


def texts(events: list[Any], kind: str = "answer") -> str:
    return "".join(e.text for e in events if isinstance(e, Piece) and e.kind == kind)


def failure(remote: Remote, **chat: Any) -> MimoError:
    last = asked(remote, **chat)[-1]
    assert isinstance(last, Failed)
    return last.error


# -- what servers send -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_servers_stream_gives_the_same_answer(
    shape: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply([SHAPES[shape]]))
    talk = Chat([Message("user", "What is it?")], thinking=True)
    events = list(ask(remote, None, talk, SamplingParams()))
    assert texts(events, "thinking") == "Let me see 思."
    assert texts(events) == "Forty-two 答."
    assert talk.messages[-1] == Message("assistant", "Forty-two 答.", "Let me see 思.")
    done = events[-1]
    assert isinstance(done, Done) and done.reason == "stop"
    stats = done.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (31, 16, 12)
    assert (stats.context_used, stats.context_limit) == (43, 8192)
    assert stats.kernel == f"remote {server.url}"
    assert next(e for e in events if isinstance(e, Prefill)).done == 0, "progress from the start"


def test_our_own_servers_comments_and_llama_servers_progress_are_progress() -> None:
    for shape, expected in (("mimo", [16, 31]), ("llama-server", [20, 31])):
        events = read(SHAPES[shape])
        assert [e.done for e in events if isinstance(e, Prefill)][:2] == expected
        assert {e.total for e in events if isinstance(e, Prefill)} == {31}


def read(stream: bytes, cuts: tuple[int, ...] = (), *, thinking: bool = True) -> list[Any]:
    """The events of a stream that arrives in pieces, cut at these places."""
    parser = EventStream()
    reading = Reading(
        thinking=thinking,
        prompt_tokens=9,
        context_limit=100,
        where="here",
        note=pytest.fail,
        clock=lambda: 1.0,
    )
    events: list[Any] = []
    places = [0, *sorted(cuts), len(stream)]
    for start, end in pairwise(places):
        for sent in parser.push(stream[start:end]):
            events += (reading.comment if sent.kind == "comment" else reading.data)(sent.text)
    assert reading.finished
    return [*events, *reading.done()]


@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)), line_end=st.sampled_from("nrb"))
def test_any_cut_of_the_bytes_gives_the_same_events(
    data: st.DataObject, shape: str, line_end: str
) -> None:
    stream = SHAPES[shape].replace(b"\r\n", b"\n")
    stream = stream.replace(b"\n", {"n": b"\n", "r": b"\r", "b": b"\r\n"}[line_end])
    places = st.lists(st.integers(0, len(stream)), max_size=40)
    assert read(stream, tuple(data.draw(places))) == read(SHAPES[shape])


def test_byte_by_byte_as_well() -> None:
    for stream in SHAPES.values():
        assert read(stream, tuple(range(len(stream)))) == read(stream)


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_no_bytes_break_the_reader(parts: list[bytes]) -> None:
    one, many = EventStream(), EventStream()
    whole = one.push(b"".join(parts))
    assert [sent for part in parts for sent in many.push(part)] == whole


def test_a_marker_at_the_start_several_lines_and_unknown_fields() -> None:
    stream = b"\xef\xbb\xbfdata: a\nid: 3\nevent: x\ndata:b\n\n: hello\nretry: 5\n\ndata: half"
    assert EventStream().push(stream) == [Sent("data", "a\nb"), Sent("comment", "hello")]


def test_a_message_without_an_end_is_given_up() -> None:
    stream = EventStream()
    with pytest.raises(ValueError, match="without an end"):
        for _ in range(LONGEST // 1_000_000 + 2):
            stream.push(b"data: " + b"x" * 1_000_000 + b"\n")


def test_with_thinking_off_an_answer_that_comes_as_thinking_is_the_answer(
    server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply([sse(chunk({"reasoning_content": "It is 42."}), chunk({}, "stop"))]))
    events = asked(remote)
    assert texts(events) == "It is 42." and not texts(events, "thinking")
    assert "reasoning parser" in " ".join(remote.take_notes())
    assert remote.take_notes() == [], "said once"


def test_with_thinking_off_thinking_before_an_answer_is_still_thinking(
    server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply([SHAPES["vllm"]]))
    events = asked(remote)
    assert (texts(events, "thinking"), texts(events)) == ("Let me see 思.", "Forty-two 答.")
    assert remote.take_notes() == []


@pytest.mark.parametrize(
    ("reason", "expected", "note"),
    [
        ("stop", "stop", ""),
        ("length", "length", ""),
        ("tool_calls", "stop", ""),
        ("content_filter", "stop", "content filter"),
        ("abort", "stop", "abort"),
    ],
)
def test_ends_are_mapped_and_odd_ones_are_said(
    reason: str, expected: str, note: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}), chunk({}, reason))]))
    assert asked(remote)[-1].reason == expected
    notes = " ".join(remote.take_notes())
    assert (note in notes) if note else not notes


def test_a_length_that_is_the_contexts_is_called_so(server: Endpoint, remote: Remote) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}, "length"), chunk(usage=usage(8000, 192)))]))
    assert asked(remote)[-1].reason == "context"


def test_without_usage_pieces_are_counted(server: Endpoint, remote: Remote) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}), chunk({"content": "b"}, "stop"))]))
    stats = asked(remote, "x" * 70)[-1].stats
    assert stats.completion_tokens == 2
    assert stats.prompt_tokens >= 20, "estimated"


def test_a_whole_answer_from_a_server_that_does_not_stream(
    server: Endpoint, remote: Remote
) -> None:
    message = {"role": "assistant", "content": "all of it", "reasoning_content": "hm"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    server.chat(Reply.json(body | {"usage": usage(5, 3)}))
    events = asked(remote, thinking=True)
    assert (texts(events, "thinking"), texts(events)) == ("hm", "all of it")
    assert events[-1].stats.completion_tokens == 3


@pytest.mark.parametrize("value", [None, -1, True, "7", 1.5, [], {}])
def test_impossible_figures_do_not_count(value: Any, server: Endpoint, remote: Remote) -> None:
    figures = {"prompt_tokens": value, "completion_tokens": value, "prompt_tokens_details": value}
    server.chat(Reply([sse(chunk({"content": "a"}, "stop"), chunk(usage=figures))]))
    assert asked(remote)[-1].stats.completion_tokens == 1


# -- what is sent ----------------------------------------------------------------------------------


def test_the_request_says_what_was_wanted_and_nothing_more(
    server: Endpoint, remote: Remote
) -> None:
    server.chat(OK)
    params = SamplingParams(temperature=0.3, top_p=0.5, seed=7, max_tokens=9)
    talk = Chat([Message("user", "hi")], system="Be brief.")
    list(ask(remote, None, talk, params, stop=["END", ""]))
    assert server.asked()[0].body == {
        "model": "mimo-v2-flash",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.3,
        "top_p": 0.5,
        "max_tokens": 9,
        "seed": 7,
        "stop": ["END"],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_fields_that_are_not_openais_are_sent_when_they_mean_something(
    server: Endpoint, remote: Remote
) -> None:
    server.chat(OK)
    params = SamplingParams(top_k=5, min_p=0.1, repetition_penalty=1.1)
    list(ask(remote, None, Chat([Message("user", "hi")], thinking=True), params))
    body = server.asked()[0].body
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (5, 0.1, 1.1)
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


def test_every_sampling_parameter_reaches_the_server() -> None:
    from dataclasses import fields

    params = SamplingParams(0.1, 0.2, 3, 0.4, 1.5, 6, 7, 0.8, 0.9)
    body = requests.body("m", [], params, thinking=False)
    for field in fields(SamplingParams):
        assert body[field.name] == getattr(params, field.name)


def test_mimos_own_system_prompt_goes_along_to_a_mimo_only(server: Endpoint) -> None:
    server.chat(OK)
    with connected(server) as remote:
        asked(remote)
    with connected(server, remote_model="other") as remote:
        asked(remote)
    first, second = (request.body["messages"] for request in server.asked())
    assert first[0]["role"] == "system" and "MiMo" in first[0]["content"]
    assert [message["role"] for message in second] == ["user"]


def test_a_conversation_in_openais_form() -> None:
    call = ToolCall("c1", "look", '{"at": "x"}')
    talk = Chat(
        [
            Message("user", "see", attachments=(Attachment("a.md", "alpha"),)),
            Message("assistant", "", "hm", tool_calls=(call,)),
            Message("tool", "found", tool_call_id="c1"),
        ]
    )
    user, answer, tool = talk.wire(mimo=False)
    assert user == {"role": "user", "content": "Document a.md:\n\nalpha\n\nsee"}
    assert answer["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "x"}'}
    assert "reasoning_content" not in answer, "left out, as locally, unless there are tools"
    assert tool == {"role": "tool", "content": "found", "tool_call_id": "c1"}
    talk.tools = ({"type": "function", "function": {"name": "look"}},)
    assert talk.wire(mimo=False)[1]["reasoning_content"] == "hm"


def test_the_key_is_sent_and_never_shown(
    server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-very-secret"
    said = {"error": {"message": f"Incorrect API key provided: {key}"}}
    with connected(server, key=key) as remote:
        server.chat(OK, Reply.json(said, 401))
        asked(remote)
        error = failure(remote)
        text = " ".join([error.message, error.hint, remote.description, repr(vars(remote).keys())])
    assert server.asked()[0].headers["authorization"] == f"Bearer {key}"
    assert key not in text + caplog.text
    assert "MIMO_REMOTE_KEY" in error.hint


def test_a_key_over_an_open_line_is_said(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requests.is_loopback("http://127.0.0.1:1") and requests.is_loopback("http://[::1]/v1")
    assert not requests.is_loopback("http://10.0.0.5")
    assert not requests.is_loopback("http://127.evil.example"), "a name, not this machine"
    settings = Settings.resolve(env={}, remote="http://cluster.invalid:8000")
    server.answer("http://cluster.invalid:8000/v1/models", Reply.json(MODELS))
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    for key, said in (("k", True), ("", False)):
        with Remote.open(settings, env={"MIMO_REMOTE_KEY": key}, pauses=()) as remote:
            assert ("without encryption" in " ".join(remote.take_notes())) is said


def test_this_machine_is_never_asked_through_a_proxy(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed.getsockname()[1]}")
        server.chat(OK)
        with connected(server) as remote:
            assert texts(asked(remote)) == "fine"


def test_a_proxy_of_the_environment_is_used_for_other_machines(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "")
    server.answer("http://cluster.invalid:8000/v1/models", Reply.json(MODELS))
    settings = Settings.resolve(env={}, remote="http://cluster.invalid:8000")
    with Remote.open(settings, env={}, pauses=()) as remote:
        assert remote.name == "mimo-v2-flash"


# -- cancelling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (Reply(stall="before"), ""),
        (Reply(stall="after"), ""),
        (Reply([sse(": prefill 1/9", done=False)], stall="after"), ""),
        (Reply([sse(chunk({"content": "a part"}), done=False)], stall="after"), "a part"),
    ],
    ids=["before the headers", "before the first byte", "while reading", "in the answer"],
)
def test_a_cancel_closes_the_connection_within_a_second_and_keeps_what_there_is(
    reply: Reply, kept: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(reply)
    talk = Chat([Message("user", "hi")])
    answer = ask(remote, None, talk, SamplingParams())
    assert server.stalled.wait(10)
    if kept:
        assert any(isinstance(event, Piece) for event in answer)
    started = time.monotonic()
    answer.cancel()
    events = list(answer)
    assert isinstance(events[-1], Done) and events[-1].reason == "cancelled"
    assert server.gone.wait(1)
    assert time.monotonic() - started < 1
    assert talk.messages[-1].content == kept


def test_a_cancel_before_the_request_is_out_and_one_after_the_end(
    server: Endpoint, remote: Remote
) -> None:
    server.chat(OK)
    stream = remote.submit_messages([{"role": "user", "content": "hi"}], SamplingParams())
    stream.cancel()
    assert isinstance(list(stream)[-1], Done)
    stream.cancel()
    assert texts(asked(remote)) == "fine"


def test_closing_ends_what_runs_and_leaves_no_thread(server: Endpoint) -> None:
    server.chat(Reply(stall="after"))
    before = threading.active_count()
    remote = connected(server)
    streams = [
        remote.submit_messages([{"role": "user", "content": "hi"}], SamplingParams())
        for _ in range(5)
    ]
    remote.close()
    remote.close()
    assert all(list(stream)[-1].reason == "cancelled" for stream in streams)  # type: ignore[union-attr]
    assert threading.active_count() == before
    with pytest.raises(UsageError):
        remote.submit_messages([], SamplingParams())


def test_many_at_once_do_not_mix(server: Endpoint, remote: Remote) -> None:
    replies = [
        Reply([sse(chunk({"content": f"{n} "}), chunk({"content": str(n)}, "stop"))])
        for n in range(20)
    ]
    server.chat(*replies)
    streams = [
        remote.submit_messages([{"role": "user", "content": "hi"}], SamplingParams())
        for _ in replies
    ]
    found = {"".join(getattr(e, "text", "") for e in stream) for stream in streams}
    assert found == {f"{n} {n}" for n in range(20)}


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, UsageError, "does not accept"),
        (403, UsageError, "does not accept"),
        (404, UsageError, "no such model"),
        (418, RemoteError, "refused the request (418)"),
        (500, RemoteError, "failed (500)"),
    ],
)
def test_a_refusal_says_what_it_is_and_is_not_asked_again(
    status: int, kind: type[MimoError], words: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply.json({"error": {"message": "teapot\x1b[31m" + "y" * 999}}, status))
    error = failure(remote)
    assert type(error) is kind
    assert words in error.message and "teapot" in error.message
    assert "\x1b" not in error.message and len(error.message) < 500
    assert len(server.asked()) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_before_the_first_byte(
    status: int, server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply.json({}, status), Reply.json({}, status), OK)
    assert texts(asked(remote)) == "fine"
    assert len(server.asked()) == 3


def test_a_server_that_stays_busy_is_given_up(server: Endpoint, remote: Remote) -> None:
    server.chat(Reply.json({"message": "too many"}, 429))
    error = failure(remote)
    assert "busy" in error.message and "too many" in error.message
    assert len(server.asked()) == 3


def test_a_long_retry_after_is_told_not_waited_for(server: Endpoint, remote: Remote) -> None:
    server.chat(Reply.json({}, 429, retry_after="3600"))
    started = time.monotonic()
    assert "3600 s" in failure(remote).message
    assert time.monotonic() - started < 5 and len(server.asked()) == 1


def test_retry_after_as_number_date_and_nonsense() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert failures.retry_after("7") == 7
    assert failures.retry_after("Thu, 01 Jan 2026 00:00:30 GMT", now) == 30
    assert failures.retry_after("Thu, 01 Jan 2015 00:00:30 GMT", now) == 0
    assert failures.retry_after("soon") is failures.retry_after(None) is None


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000",
        "Input length (9000 tokens) exceeds the maximum allowed length: longer than the model's "
        "context length",
        "the request exceeds the available context size",
    ],
)
def test_a_prompt_that_is_too_long_is_that_error(
    said: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(Reply.json({"object": "error", "message": said, "code": 400}, 400))
    assert isinstance(failure(remote), ContextOverflowError)


def test_fields_a_server_does_not_know_are_left_out_and_that_is_said(
    server: Endpoint, remote: Remote
) -> None:
    said = "Unrecognized request argument supplied: chat_template_kwargs"
    server.chat(Reply.json({"error": {"message": said}}, 400), OK)
    assert texts(asked(remote)) == "fine"
    assert "chat_template_kwargs" not in server.asked()[1].body
    assert "chat_template_kwargs" in " ".join(remote.take_notes())
    asked(remote)
    assert len(server.asked()) == 3, "learnt for the next time"


def test_a_redirect_is_not_followed(server: Endpoint, remote: Remote) -> None:
    with Endpoint() as other:
        server.chat(Reply(status=307, headers={"location": f"{other.url}/v1/chat/completions"}))
        error = failure(remote)
        assert other.url in error.message and "not followed" in error.message
        assert other.requests == []


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply([b"<html>Log in"], kind="text/html"), "text/html instead of an answer"),
        (Reply([b"data: {nonsense\n\n"]), "no chunk of an answer: {nonsense"),
        (Reply([b"data: [1]\n\n"]), "no chunk"),
        (Reply([b"data: " + b"[" * 100_000 + b"\n\n"]), "no chunk"),
        (Reply([sse(chunk({"content": "a"}), done=False)]), "broke off"),
        (Reply([sse(chunk({"content": "a"}), done=False)], drop=True), "broke off"),
        (Reply([b'data: {"choices": [{"del'], drop=True), "broke"),
        (Reply([sse({"error": {"message": "CUDA out of memory"}})]), "CUDA out of memory"),
        (Reply([sse({"error": "worker died"})]), "worker died"),
        (Reply([b'error: {"code": 500, "message": "slot lost"}\n\n']), "slot lost"),
        (Reply.json({"error": {"message": "bad day"}}), "bad day"),
        (Reply.json({"hello": 1}), "instead of an answer"),
    ],
)
def test_a_stream_that_is_none_or_breaks_off_is_an_error(
    reply: Reply, words: str, server: Endpoint, remote: Remote
) -> None:
    server.chat(reply)
    talk = Chat([Message("user", "hi")])
    events = list(ask(remote, None, talk, SamplingParams()))
    assert isinstance(events[-1], Failed)
    error = events[-1].error
    assert isinstance(error, RemoteError) and words in error.message
    assert len(server.asked()) == 1, "not asked again once something has come"
    assert [m.role for m in talk.messages] == ["user"]


def test_a_server_that_falls_silent_is_given_up(server: Endpoint) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}), done=False)], stall="after"))
    with Remote(connection.Server(server.url, pauses=(), silence_s=0.2)) as remote:
        assert "sent nothing for too long" in failure(remote).message


def test_a_server_that_is_not_there(server: Endpoint) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        settings = Settings.resolve(env={}, remote=url)
        with pytest.raises(RemoteError, match="cannot be reached") as caught:
            Remote.open(settings, env={}, pauses=(0.01,))
    assert "--remote off" in caught.value.hint


def test_something_that_is_no_tls(server: Endpoint) -> None:
    settings = Settings.resolve(env={}, remote=server.url.replace("http:", "https:"))
    with pytest.raises(RemoteError, match=server.url[5:]):
        Remote.open(settings, env={}, pauses=())


def test_a_page_that_is_no_api(server: Endpoint) -> None:
    server.answer("/v1/models", Reply([b"<html>It works!"], kind="text/html"))
    with pytest.raises(UsageError, match="no OpenAI-compatible server: it sent <html>"):
        connected(server)


# -- which model, which context, how to count ------------------------------------------------------


def listed(*entries: Any) -> dict[str, Any]:
    return {"object": "list", "data": [e if isinstance(e, dict) else {"id": e} for e in entries]}


def test_the_only_model_the_only_mimo_or_the_one_that_is_wanted() -> None:
    assert requests.choose(listed("a"), None, "here") == ("a", None)
    assert requests.choose(listed("a", "x/MiMo-V2-Flash"), None, "here")[0] == "x/MiMo-V2-Flash"
    assert requests.choose(listed("a", "b"), "b", "here")[0] == "b"
    assert requests.choose(listed(), "b", "here")[0] == "b"
    with pytest.raises(UsageError, match="2 models") as caught:
        requests.choose(listed("a", "b"), None, "here")
    assert "a, b" in caught.value.hint
    for nothing in ({}, None, [], {"data": [{"id": ""}, 3]}, {"data": "x"}):
        with pytest.raises(UsageError, match="does not say"):
            requests.choose(nothing, None, "here")


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        ({"max_model_len": 65536}, 65536),  # vLLM, SGLang
        ({"meta": {"n_ctx_train": 262144}}, 262144),  # llama-server
        ({"context_length": 262144}, 262144),  # OpenRouter
        ({"max_model_len": None}, None),
        ({"max_model_len": "8"}, None),
        ({}, None),
    ],
)
def test_the_context_is_the_servers(entry: Any, size: int | None) -> None:
    assert requests.choose(listed({"id": "a"} | entry), None, "here") == ("a", size)


def test_a_smaller_context_may_be_set_and_an_unknown_one_is_said(server: Endpoint) -> None:
    for setting, expected in ((None, 8192), (4096, 4096), (100_000, 8192)):
        with connected(server, context=setting) as remote:
            assert remote.context_limit == expected
            assert "assumed" not in remote.description
    server.answer("/v1/models", Reply.json(listed("mimo")))
    with connected(server) as remote:
        assert "assumed" in remote.description
    with connected(server, context=200_000) as remote:
        assert remote.context_limit == 200_000 and "assumed" not in remote.description


def test_a_gateway_without_a_list_takes_a_named_model(server: Endpoint) -> None:
    server.answer("/v1/models", Reply.json({}, 404))
    server.chat(OK)
    with pytest.raises(UsageError, match="no such model or page"):
        connected(server)
    with connected(server, remote_model="mimo") as remote:
        assert texts(asked(remote)) == "fine"


@pytest.mark.parametrize(
    ("address", "base", "root"),
    [
        ("http://a:1", "http://a:1/v1", "http://a:1"),
        ("http://a:1/v1", "http://a:1/v1", "http://a:1"),
        ("https://a/api/v1/", "https://a/api/v1", "https://a/api"),
        ("https://a/openai", "https://a/openai", "https://a/openai"),
    ],
)
def test_addresses(address: str, base: str, root: str) -> None:
    assert (requests.base(address), requests.root(address)) == (base, root)


@pytest.mark.parametrize(
    "body",
    [{"count": 3, "tokens": [1, 2, 3], "max_model_len": 9}, {"tokens": [1, 2, 3]}, {"count": 3}],
)
def test_tokens_are_counted_by_the_server_if_it_can(body: Any, server: Endpoint) -> None:
    server.answer("/tokenize", Reply.json(body))
    with connected(server) as remote:
        assert remote.counts_exactly and "counted by the server" in remote.description
        assert len(remote.tokenizer.encode("some text")) == 3
        assert len(remote.tokenizer.encode("some text")) == 3
        prompt = remote.tokenizer.render_chat([{"role": "user", "content": "some text"}])
        assert 3 < len(prompt) < 30
    sent = server.asked("/tokenize")[1:]
    assert len(sent) == 1, "the same text is asked for once"
    assert sent[0].body["prompt"] == sent[0].body["content"] == "some text"
    assert sent[0].body["model"] == "mimo-v2-flash"


def test_a_server_that_cannot_count_leaves_an_estimate(server: Endpoint) -> None:
    with connected(server) as remote:
        assert not remote.counts_exactly and "estimated" in remote.description
        assert remote.tokenizer.encode("") == []
        assert len(remote.tokenizer.encode("four words of text")) == estimate("four words of text")
    assert len(server.asked("/tokenize")) == 1


def test_a_count_that_fails_later_is_an_estimate_and_said(server: Endpoint) -> None:
    server.answer("/tokenize", Reply.json({"tokens": [1]}), Reply.json({}, 500))
    with connected(server) as remote:
        assert len(remote.tokenizer.encode("abcdefg")) == 2
        assert "estimated" in " ".join(remote.take_notes())


def test_estimates_are_rather_too_high() -> None:
    english = "The quick brown fox jumps over the lazy dog. " * 20
    assert 200 < estimate(english) < 400, "180 words"
    assert 60 <= estimate("你好，世界。" * 15) <= 90
    assert RemoteTokenizer(None).encode("x" * 35) == [0] * 10


def test_ids_and_sessions_mean_nothing_to_a_server(remote: Remote) -> None:
    assert remote.new_session() is None and remote.experts_now() is None  # type: ignore[func-returns-value]
    with pytest.raises(UsageError, match="messages"):
        remote.submit(None, [1, 2], SamplingParams())


def test_the_first_words_say_that_texts_leave(remote: Remote, server: Endpoint) -> None:
    assert server.url in remote.privacy and "sent" in remote.privacy
    assert "remote" in remote.description and server.url in remote.description


def test_figures_of_a_cancelled_answer(server: Endpoint, remote: Remote) -> None:
    server.chat(Reply(stall="before"))
    stream = remote.submit_messages([{"role": "user", "content": "hi"}], SamplingParams())
    assert server.stalled.wait(10)
    stream.cancel()
    last = list(stream)[-1]
    assert isinstance(last, Done)
    assert last.stats.completion_tokens == 0
    assert isinstance(last.stats, Stats) and last.stats.kernel.startswith("remote ")


def test_importing_it_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mimo_local.remote; "
        "print([m for m in ('torch', 'numpy', 'httpx2', 'textual') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
