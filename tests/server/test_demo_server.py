"""The real thing: the demo model behind the server, asked by the official client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import Serving, serving, wait_until

from mimo_local.engine import Engine
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

pytestmark = pytest.mark.demo

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 20},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["colour", "count", "names"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop_everything"}},
]


@pytest.fixture(scope="module")
def server(demo_pack_dir: Path) -> Iterator[Serving]:
    engine = Engine.load(Settings(model=demo_pack_dir, context=2048, threads=2, draft="off"))
    with serving(engine, params=SamplingParams(temperature=0)) as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def ask(client: openai.OpenAI, server: Serving) -> Any:
    assert server.service.engine is not None
    name = server.service.engine.name

    def create(text: str, **more: Any) -> Any:
        messages: Any = more.pop("messages", [{"role": "user", "content": text}])
        return client.chat.completions.create(
            model=name, messages=messages, **{"max_tokens": 60, **more}
        )

    return create


def test_json_fits_its_schema(ask: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "bag", "schema": SCHEMA}}
    for seed in range(3):
        found = ask(
            "Describe a bag of marbles as JSON.", response_format=form, max_tokens=200,
            temperature=1.0, seed=seed,
        ).choices[0]  # fmt: skip
        assert found.finish_reason == "stop", found
        bag = json.loads(found.message.content)
        assert list(bag) == ["colour", "count", "names"]
        assert bag["colour"] in ("red", "green", "blue") and 1 <= bag["count"] <= 20
        assert len(bag["names"]) <= 3 and all(len(name) <= 12 for name in bag["names"])


def test_a_named_tool_is_called(ask: Any) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for stream in (False, True):
        found = ask("What is the weather in Paris?", tools=TOOLS, tool_choice=choice, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in found]
            (call,) = [call for c in chunks for call in c.delta.tool_calls or ()]
            assert chunks[-1].finish_reason == "tool_calls"
            assert not any(c.delta.content for c in chunks), "no tag leaks into the text"
        else:
            (call,) = found.choices[0].message.tool_calls
            assert found.choices[0].finish_reason == "tool_calls"
            assert found.choices[0].message.content is None
        assert call.function.name == "get_weather"
        given = json.loads(call.function.arguments)
        assert set(given) == {"city", "days"} and 1 <= given["days"] <= 7


def test_some_tool_is_called_when_one_must_be(ask: Any) -> None:
    found = ask("Stop everything!", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name in ("get_weather", "stop_everything")


def test_results_of_tools_go_back_in(ask: Any) -> None:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 1}'}  # type: ignore[assignment]
    found = ask(
        "",
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "It is 18 C and it rains."},
        ],
        tools=TOOLS,
    )
    assert found.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert found.usage.completion_tokens > 0


def test_a_seed_repeats_and_another_does_not(ask: Any) -> None:
    # The first reads the prompt, the second finds it in the cache.
    texts = [
        ask("Tell me about the sea.", temperature=1.0, seed=seed).choices[0].message.content
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    both = ask("Tell me about the sea.", temperature=1.0, seed=5, n=2)
    assert both.choices[0].message.content != both.choices[1].message.content


def test_streamed_is_whole(ask: Any) -> None:
    whole = ask("Name two colours.").choices[0].message.content
    chunks = ask("Name two colours.", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole


def test_usage_counts_and_the_second_turn_is_cached(ask: Any, server: Serving) -> None:
    question = "Write one long sentence about a lighthouse, please."
    first = ask(question, max_tokens=20)
    tokenizer = server.service.engine.tokenizer  # type: ignore[union-attr]
    assert tokenizer is not None
    prompt = tokenizer.render_chat([{"role": "user", "content": question}])
    assert first.usage.prompt_tokens == len(prompt)
    assert 1 <= first.usage.completion_tokens <= 20
    answer = first.choices[0].message.content
    again = ask(
        "",
        messages=[
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Thank you."},
        ],
        max_tokens=5,
    )
    assert again.usage.prompt_tokens_details.cached_tokens >= len(prompt) - 1
    assert again.timings["cache_n"] == again.usage.prompt_tokens_details.cached_tokens


def test_logprobs_are_the_models_own(ask: Any) -> None:
    choice = ask("Name two colours.", logprobs=True, top_logprobs=5, max_tokens=10).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries).startswith(choice.message.content[:5])
    for entry in entries:
        likely = [top.logprob for top in entry.top_logprobs]
        assert likely == sorted(likely, reverse=True) and len(likely) == 5
        assert sum(map(math.exp, likely)) <= 1 + 1e-4
        assert math.isclose(entry.logprob, likely[0], abs_tol=1e-4), "greedy takes the likeliest"


def test_who_leaves_while_the_prompt_is_read_stops_the_reading(server: Serving) -> None:
    engine = server.service.engine
    assert engine is not None
    text = " ".join(f"Line {n} of the log: the lamp was lit." for n in range(140))
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = server.connect()
    connection.sendall(head.encode() + data)
    seen = b""
    while b": prefill " not in seen:
        seen += connection.recv(65536)
    connection.close()
    wait_until(lambda: not server.service.active and not engine.running)
    reasons = server.service.metrics.text().decode()
    assert 'mimo_answers_total{reason="cancelled"} 1.0' in reasons
    assert b'content": "The' not in seen
