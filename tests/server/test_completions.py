"""/v1/completions and the small routes, with the official client and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from servers import Serving, serving

from mimo_local.events import DraftFigures, ExpertFigures
from mimo_local.server.replies import CompletionChunk, CompletionReply


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


def ask(client: openai.OpenAI, prompt: Any = "Once", **more: Any) -> Any:
    return client.completions.create(model="fake", prompt=prompt, **more)


def test_a_text_is_continued(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue(" upon", " a time", reason="length")
    found = ask(client, max_tokens=9, stop="END", seed=1)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (" upon a time", "length")
    assert found.usage.prompt_tokens == 4
    assert engine.requests[0].prompt == "Once", "no chat turns"
    assert engine.requests[0].params.max_tokens == 9
    CompletionReply.model_validate(found.model_dump(exclude_unset=True))
    ask(client)
    assert engine.requests[1].params.max_tokens == 16, "OpenAI's own default"


def test_streamed_and_echoed(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue(" upon", " a time")
    chunks = list(ask(client, stream=True, echo=True, stream_options={"include_usage": True}))
    assert [c.choices[0].text for c in chunks[:-1]] == ["Once", " upon", " a time", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 6
    for chunk in chunks:
        CompletionChunk.model_validate(chunk.model_dump(exclude_unset=True))
    engine.queue(" upon")
    assert ask(client, echo=True).choices[0].text == "Once upon"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", ["ab"]),
        ([97, 98], ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_prompts_of_every_shape(
    client: openai.OpenAI, engine: FakeEngine, prompt: Any, read: list[str]
) -> None:
    found = ask(client, prompt, n=2, seed=5, echo=True)
    assert [request.prompt for request in engine.requests] == [p for p in read for _ in range(2)]
    assert [request.params.seed for request in engine.requests] == [5, 6] * len(read)
    assert [choice.index for choice in found.choices] == list(range(2 * len(read)))
    assert [choice.text for choice in found.choices] == [
        f"{p}fake answer" for p in read for _ in range(2)
    ]
    assert found.usage.prompt_tokens == sum(map(len, read))


def test_logprobs_in_the_older_form(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.queue("a", "", "b")
    found = ask(client, logprobs=2).choices[0]
    assert found.logprobs.tokens[0] == "a" and found.logprobs.tokens[-1] == "b"
    assert len(found.logprobs.token_logprobs) == len(found.logprobs.tokens) == 3
    assert all(len(top) == 2 for top in found.logprobs.top_logprobs[::2])
    assert found.logprobs.text_offset == [0, 1, 1]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"suffix": " end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "16 answers"),
        ({"prompt": [-1]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_is_refused(server: Serving, body: dict[str, Any], reason: str) -> None:
    status, found = server.json("POST", "/v1/completions", {"prompt": "x", **body})
    assert status == 400
    assert reason in found["error"]["message"]


def test_tokens_there_and_back(server: Serving) -> None:
    status, found = server.json("POST", "/tokenize", {"content": "né"})
    assert (status, found) == (200, {"tokens": [110, 233]})
    status, found = server.json("POST", "/detokenize", {"tokens": [110, 233]})
    assert (status, found) == (200, {"content": "né"})
    status, found = server.json("POST", "/detokenize", {"tokens": [1 << 30]})
    assert status == 400 and "vocabulary" in found["error"]["message"]


def test_a_model_without_a_tokenizer_takes_ids(engine: FakeEngine) -> None:
    engine.tokenizer = None  # type: ignore[assignment]
    with serving(engine) as server:
        status, found = server.json("POST", "/v1/completions", {"prompt": [97]})
        assert status == 200
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"content": "x"}),
        ):
            status, found = server.json("POST", path, body)
            assert status == 400 and "tokenizer" in found["error"]["message"]


def test_metrics_count_what_happened(server: Serving, engine: FakeEngine) -> None:
    engine.experts = ExpertFigures(wanted=10, ram_hits=7, misses=3, disk_bytes=1000, ram_bytes=50)
    ask_body = {"prompt": "abcd"}
    assert server.json("POST", "/v1/completions", ask_body)[0] == 200
    assert server.json("POST", "/v1/completions", {"prompt": ""})[0] == 400
    assert server.call("GET", "/nowhere/else")[0] == 404
    status, headers, data = server.call("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = data.decode().splitlines()
    for line in (
        'mimo_requests_total{path="/v1/completions",status="200"} 1.0',
        'mimo_requests_total{path="/v1/completions",status="400"} 1.0',
        'mimo_requests_total{path="other",status="404"} 1.0',
        'mimo_answers_total{reason="stop"} 1.0',
        'mimo_tokens_total{kind="prompt"} 4.0',
        'mimo_tokens_total{kind="completion"} 2.0',
        'mimo_experts_total{tier="disk"} 3.0',
        "mimo_expert_disk_bytes_total 1000.0",
        "mimo_queue_length 0.0",
        "mimo_running 0.0",
        "mimo_kv_bytes 1024.0",
        "mimo_model_loaded 1.0",
        "mimo_request_seconds_count 1.0",
        "mimo_first_token_seconds_count 1.0",
    ):
        assert line in lines, line


def test_drafts_are_counted(server: Serving, engine: FakeEngine) -> None:
    from mimo_local.events import Stats

    drafts = DraftFigures((1, 4), (4,), (3,))
    server.service.metrics.ended("stop", Stats(draft=drafts), 1.0)
    text = server.call("GET", "/metrics")[2].decode()
    assert 'mimo_drafts_total{result="accepted"} 3.0' in text
    assert 'mimo_drafts_total{result="rejected"} 1.0' in text
    assert "mimo_draft_passes_total 5.0" in text
