"""/v1/chat/completions with the official client: every feature, streamed and whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from servers import Serving, events, serving

from mimo_local.errors import BusyError, ContextOverflowError, MimoError
from mimo_local.server.replies import ChatChunk, ChatReply

ASK: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n"
    "<parameter=days>3</parameter>\n</function>\n</tool_call>"
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Serving]:
    with serving(engine) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "fake", "messages": ASK}
    return client.chat.completions.create(**given | more)


def test_a_whole_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("Hel", "lo")
    found = ask(client, max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=["END"])
    assert found.choices[0].message.content == "Hello"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].logprobs is None
    assert (found.object, found.model) == ("chat.completion", "fake")
    params = engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (7, 0.5, 0.9, 3)
    assert engine.requests[0].stop == ("END",)
    usage = found.usage
    assert usage.prompt_tokens == len(engine.requests[0].ids)
    assert usage.completion_tokens == 2
    assert usage.total_tokens == usage.prompt_tokens + 2
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert found.timings["predicted_n"] == 2
    ChatReply.model_validate(found.model_dump(exclude_unset=True))


def test_a_streamed_answer_and_its_usage(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("Hel", "lo", reason="length")
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert texts == ["", "Hel", "lo", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks:
        ChatChunk.model_validate(chunk.model_dump(exclude_unset=True))
    engine.queue("x")
    assert all(chunk.choices for chunk in ask(client, stream=True))


def test_sampling_values_of_other_servers(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    ask(client, presence_penalty=0.5, frequency_penalty=-0.5, seed=-1, extra_body=extra)
    params = engine.requests[0].params
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.1, 1.2)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert params.seed == (1 << 63) - 1
    ask(client, max_completion_tokens=9, max_tokens=7, extra_body={"top_k": -1})
    assert (engine.requests[1].params.max_tokens, engine.requests[1].params.top_k) == (9, 0)
    ask(client)
    room = engine.context_limit - len(engine.requests[2].ids)
    assert engine.requests[2].params.max_tokens == room, "as long as the context allows"


def test_n_answers_have_their_own_seeds(client: openai.OpenAI, engine: FakeEngine) -> None:
    for text in "abc":
        engine.queue(text)
    found = ask(client, n=3, seed=10)
    assert sorted(choice.message.content for choice in found.choices) == ["a", "b", "c"]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [request.params.seed for request in engine.requests] == [10, 11, 12]
    assert found.usage.prompt_tokens == len(engine.requests[0].ids), "one prompt counts once"
    assert found.usage.completion_tokens == 3
    for text in "abc":
        engine.queue(text, text)
    texts = {0: "", 1: "", 2: ""}
    ends = set()
    for chunk in ask(client, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends |= {choice.index} if choice.finish_reason else set()
    assert sorted(texts.values()) == ["aa", "bb", "cc"]
    assert ends == {0, 1, 2}


@pytest.mark.parametrize(
    "switch",
    [
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"thinking": True}},
        {"reasoning_effort": "high"},
        {"thinking": {"type": "enabled"}},
        {"thinking": True},
        # The template's own switch wins.
        {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
    ],
)
def test_thinking_on_and_off(
    client: openai.OpenAI, engine: FakeEngine, switch: dict[str, Any]
) -> None:
    engine.queue("<think>so ", "so</think>", "Yes")
    found = ask(client, extra_body=switch).choices[0]
    assert found.message.reasoning_content == "so so"
    assert found.message.content == "Yes"
    assert engine.requests[0].prompt.endswith("<assistant>")
    off = json.loads(
        json.dumps(switch).replace("true", "false").replace("enabled", "disabled")
        .replace("high", "minimal")
    )  # fmt: skip
    found = ask(client, extra_body=off).choices[0]
    assert engine.requests[1].prompt.endswith("<think></think>")
    assert not hasattr(found.message, "reasoning_content")


def test_thinking_streams_apart_and_is_counted(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("<think>", "so", "</think>", "Yes")
    body = {"reasoning_effort": "low"}
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, extra_body=body))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "so"
    assert "".join(d.content or "" for d in deltas) == "Yes"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 3


def test_reasoning_and_results_come_back_in(client: openai.OpenAI, engine: FakeEngine) -> None:
    seen: dict[str, Any] = {}
    render = engine.tokenizer.render_chat

    def spy(messages: Any, **kwargs: Any) -> list[int]:
        seen.update(kwargs, messages=messages)
        return render(messages, **kwargs)

    engine.tokenizer.render_chat = spy  # type: ignore[method-assign]
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    ask(
        client,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
        ],
        tools=[TOOL],
    )
    system, user, assistant, tool = seen["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "one\ntwo"
    assert assistant["reasoning_content"] == "hm"
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert tool == {"role": "tool", "content": "18 C", "tool_call_id": "call_1"}
    assert seen["tools"][0]["function"]["name"] == "get_weather"
    assert seen["keep_all_reasoning"] is True


def test_a_call_whole(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("Let me see.\n", CALL, "\n", CALL)
    choice = ask(client, tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    one, two = choice.message.tool_calls
    assert (one.function.name, one.type) == ("get_weather", "function")
    assert json.loads(one.function.arguments) == {"city": "Paris", "days": 3}
    assert one.id != two.id
    engine.queue(CALL)
    assert ask(client, tools=[TOOL]).choices[0].message.content is None


def test_a_call_streamed_letter_by_letter(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue(*f"<think>I call{CALL}now</think>ok {CALL}")
    calls, text, thought = [], "", ""
    for chunk in ask(client, tools=[TOOL], stream=True, reasoning_effort="high"):
        delta = chunk.choices[0].delta
        calls += delta.tool_calls or []
        text += delta.content or ""
        thought += getattr(delta, "reasoning_content", None) or ""
    assert chunk.choices[0].finish_reason == "tool_calls"
    assert (text, thought) == ("ok", "I callnow")
    assert [call.index for call in calls] == [0, 1]
    for call in calls:
        assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}


def test_tool_choice_none_gives_no_tools(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue(CALL)
    choice = ask(client, tools=[TOOL], tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
    assert engine.requests[0].constraint is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call_is_constrained(
    client: openai.OpenAI, engine: FakeEngine, choice: Any
) -> None:
    engine.queue(CALL)
    found = ask(client, tools=[TOOL], tool_choice=choice).choices[0]
    assert found.finish_reason == "tool_calls"
    assert engine.requests[0].constraint is not None
    ask(client, tools=[TOOL], tool_choice="auto")
    assert engine.requests[1].constraint is None


def test_one_call_at_a_time_stops_behind_it(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue(CALL, CALL, "more", hold=True)
    choice = ask(client, tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(choice.message.tool_calls) == 1
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        ({"type": "text"}, False),
        ({"type": "json_object"}, True),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
            True,
        ),
    ],
)
def test_response_formats(
    client: openai.OpenAI, engine: FakeEngine, form: Any, bound: bool
) -> None:
    ask(client, response_format=form)
    constraint = engine.requests[0].constraint
    assert (constraint is not None) == bound
    if form["type"] == "json_schema":
        allowed = {chr(i) for i, ok in enumerate(constraint._allowed(256)) if ok}
        assert allowed == set("-0123456789")


def test_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("<think>", "x", "</think>", "a", "b", "é")
    choice = ask(client, logprobs=True, top_logprobs=2, reasoning_effort="high").choices[0]
    entries = choice.logprobs.content
    assert [entry.token for entry in entries] == ["a", "b", "é"], "of the answer alone"
    assert entries[2].bytes == list("é".encode())
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)
    assert engine.requests[0].logprobs == 2
    engine.queue("a", "b")
    found: list[Any] = []
    for chunk in ask(client, logprobs=True, stream=True):
        if chunk.choices[0].logprobs is not None:
            assert chunk.choices[0].delta.content is not None
            found += chunk.choices[0].logprobs.content
    assert [entry.token for entry in found] == ["a", "b"]
    assert engine.requests[1].logprobs == 0
    assert all(entry.top_logprobs == [] for entry in found)


def test_the_prompt_is_counted_without_answering(server: Serving, engine: FakeEngine) -> None:
    body = {"messages": ASK}
    status, found = server.json("POST", "/v1/chat/completions/input_tokens", body)
    assert status == 200 and not engine.requests
    assert found["input_tokens"] == len("<user>hi\n<assistant><think></think>")


def test_the_transcript_of_a_stream(
    server: Serving, engine: FakeEngine, golden: Callable[[str, str], None]
) -> None:
    engine.queue("<think>", "Paris is in", " France.", "</think>", "Let me look.", CALL)
    body = {
        "messages": ASK, "tools": [TOOL], "stream": True, "reasoning_effort": "low",
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    status, headers, data = server.call("POST", "/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    text = re.sub(r'"created": \d+', '"created": 0', data.decode())
    text = re.sub(r"mimo-local-[0-9.]+", "mimo-local", text)
    text = re.sub(r"(chatcmpl-|call_)[0-9a-f]{24}", r"\g<1>0", text)
    golden("server/stream.txt", text)
    assert events(data)[-1] == "[DONE]"


# ---- what goes wrong -----------------------------------------------------------------------------


def test_an_error_on_the_way(client: openai.OpenAI, engine: FakeEngine) -> None:
    error = MimoError("the disk is gone", hint="plug it in")
    engine.queue("some", " text", error=error)
    with pytest.raises(openai.InternalServerError, match=r"disk is gone.*plug it in"):
        ask(client)
    engine.queue("some", " text", error=error)
    text = ""
    with pytest.raises(openai.APIError, match="disk is gone"):
        for chunk in ask(client, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "some text", "what was made is kept"


def test_a_bug_in_the_middle_of_a_stream_is_told_too(
    server: Serving, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimo_local.server import chat_routes

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(chat_routes, "_take", broken)
    status, _, data = server.call("POST", "/v1/chat/completions", {"messages": ASK, "stream": True})
    assert status == 200
    assert events(data)[-1]["error"]["code"] == "internal_error"
    assert b"secret" not in data


def test_errors_of_the_engine_have_their_status(
    client: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(error: Exception) -> Callable[..., Any]:
        def raising(*args: Any, **kwargs: Any) -> Any:
            raise error

        return raising

    monkeypatch.setattr(engine, "submit", submit(BusyError("the queue is full", hint="later")))
    with pytest.raises(openai.RateLimitError) as busy:
        ask(client)
    assert 1 <= int(busy.value.response.headers["retry-after"]) <= 60
    monkeypatch.setattr(engine, "submit", submit(ContextOverflowError("too long", hint="cut it")))
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, stream=True)
    assert long.value.code == "context_length_exceeded"
    monkeypatch.setattr(engine, "submit", submit(ZeroDivisionError("secret detail")))
    with pytest.raises(openai.InternalServerError) as unexpected:
        ask(client)
    assert "secret" not in str(unexpected.value)
    assert unexpected.value.body["type"] == "server_error"  # type: ignore[index]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"),
    ({"messages": [{"role": "king", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": None}]}, "no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [
        {"function": {"name": "f"}}]}]}, "assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "no json"}}]}, *ASK]}, "not valid JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[1]"}}]}, *ASK]}, "no JSON object"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" * 100_000}}]}, *ASK]}, "not valid JSON"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"top_logprobs": 3}, "logprobs"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"functions": [{"name": "f"}]}, "use `tools`"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"max_token": 5}, "did you mean `max_tokens`"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template_kwargs": {"frob": True}}, "frob"),
    ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "true or false"),
    ({"tools": [TOOL, TOOL]}, "same name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "array"}}}]}, "object"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "properties": {"a": 1}}}}]}, "schema"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "properties": {"a>b": {}}}}}]}, "line break"),
    ({"tool_choice": "required"}, "no tool"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"type": "frob"}}}}, "frob"),
    ({"response_format": {"type": "xml"}}, "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_is_refused(
    server: Serving, engine: FakeEngine, body: dict[str, Any], reason: str
) -> None:
    for stream in (False, True):
        given = {"messages": ASK, "stream": stream, **body}
        status, found = server.json("POST", "/v1/chat/completions", given)
        assert status == 400, found
        assert reason in found["error"]["message"]
        assert found["error"]["type"] == "invalid_request_error"
        assert set(found["error"]) == {"message", "type", "param", "code"}
    assert not engine.requests


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"logit_bias": {}, "functions": None, "echo_of_nothing": 1},
        {"parallel_tool_calls": True, "tools": None, "stream_options": None},
    ],
)
def test_what_changes_nothing_is_ignored(server: Serving, body: dict[str, Any]) -> None:
    status, _ = server.json("POST", "/v1/chat/completions", {"messages": ASK, **body})
    assert status == 200


def test_an_unknown_model_is_not_answered_by_another(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="only `fake`"):
        ask(client, model="gpt-4o")
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/4o")


def test_an_alias_is_another_name(engine: FakeEngine) -> None:
    with serving(engine, aliases=("gpt-4o",)) as server:
        status, _ = server.json(
            "POST", "/v1/chat/completions", {"model": "gpt-4o", "messages": ASK}
        )
        assert status == 200
        names = [entry["id"] for entry in server.json("GET", "/v1/models")[1]["data"]]
        assert names == ["fake", "gpt-4o"]
