"""An OpenAI-compatible server as bytes: what it sends, how it is cut, when it stalls or vanishes.

`with Endpoint() as server:` listens on a free port of this machine. `server.answer(path, *replies)`
queues replies, the last one stays; `server.requests` keeps what was asked. The streams below have
the shapes that vLLM, SGLang, llama-server, `mimo serve` and OpenAI send.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


def sse(*chunks: Any, done: bool = True, newline: str = "\n") -> bytes:
    """Chunks as an event stream; a text is sent as it is (a comment, or what is no JSON)."""
    lines = [c if isinstance(c, str) else f"data: {json.dumps(c)}" for c in chunks]
    lines += ["data: [DONE]"] * done
    return "".join(line + newline * 2 for line in lines).encode()


def chunk(delta: Mapping[str, Any] | None = None, reason: str | None = None, **more: Any) -> Any:
    """One chunk of a stream."""
    choices = [] if delta is None else [{"index": 0, "delta": dict(delta), "finish_reason": reason}]
    return {
        "id": "chatcmpl-7f3a",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "mimo-v2-flash",
        "choices": choices,
        **more,
    }


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    """The figures at the end."""
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return found


VLLM = sse(
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "Let me", "reasoning": "Let me"}),
    chunk({"reasoning_content": " see 思.", "reasoning": " see 思."}),
    chunk({"content": "Forty"}),
    chunk({"content": "-two 答."}),
    chunk({"content": ""}, "stop", stop_reason=None),
    chunk(usage=usage(31, 12, 16)),
)
SGLANG = sse(
    chunk(
        {"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None},
        usage=None,
    ),
    chunk({"content": None, "reasoning_content": "Let me", "tool_calls": None}, usage=None),
    chunk({"content": None, "reasoning_content": " see 思.", "tool_calls": None}, usage=None),
    chunk({"content": "Forty", "reasoning_content": None}, usage=None),
    chunk({"content": "-two 答.", "reasoning_content": None}, usage=None),
    chunk({"content": None, "reasoning_content": None}, "stop", usage=None),
    chunk(usage=usage(31, 12, 16) | {"reasoning_tokens": 5}),
)
LLAMA = sse(
    chunk(prompt_progress={"total": 31, "cache": 16, "processed": 20, "time_ms": 90}),
    chunk({"role": "assistant", "content": None}),
    chunk({"reasoning_content": "Let me"}),
    chunk({"reasoning_content": " see 思."}),
    chunk({"content": "Forty"}),
    chunk({"content": "-two 答."}),
    chunk({}, "stop"),
    chunk(usage=usage(31, 12, 16), timings={"prompt_n": 15, "predicted_n": 12}),
)
OURS = sse(
    ": prefill 16/31",
    ": prefill 31/31",
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "Let me"}),
    chunk({"reasoning_content": " see 思."}),
    chunk({"content": "Forty"}),
    chunk({"content": "-two 答."}),
    chunk({}, "stop"),
    chunk(usage=usage(31, 12, 16)),
)
TAGS = sse(  # a server without a reasoning parser
    chunk({"role": "assistant", "content": ""}),
    *(chunk({"content": text}) for text in ("<thi", "nk>Let me", " see 思.</th", "ink>\n\nForty")),
    chunk({"content": "-two 答."}, "stop"),
    chunk(usage=usage(31, 12, 16)),
    newline="\r\n",
)
SHAPES = {"vllm": VLLM, "sglang": SGLANG, "llama-server": LLAMA, "mimo": OURS, "tags": TAGS}

MODELS = {
    "object": "list",
    "data": [{"id": "mimo-v2-flash", "object": "model", "max_model_len": 8192}],
}


@dataclass
class Reply:
    """One response. `parts` are sent one after another, each by itself."""

    parts: Sequence[bytes] = ()
    status: int = 200
    kind: str = "text/event-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
    stall: str = ""
    """Where to wait until the client is gone: `before` the headers, or `after` the parts."""
    drop: bool = False
    """Close in the middle of the body."""
    pause: threading.Event | None = None
    """Wait for this after the first part."""

    @classmethod
    def json(cls, body: Any, status: int = 200, **headers: str) -> Reply:
        return cls([json.dumps(body).encode()], status, "application/json", headers)


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Endpoint:
    """The server, on a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[Asked] = []
        self.gone = threading.Event()
        """A client closed its connection while it was being kept waiting."""
        self.stalled = threading.Event()
        self._replies: dict[str, list[Reply]] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answer("/v1/models", Reply.json(MODELS))

    def answer(self, path: str, *replies: Reply) -> None:
        self._replies[path] = list(replies)

    def chat(self, *replies: Reply) -> None:
        self.answer("/v1/chat/completions", *replies)

    def asked(self, path: str = "/v1/chat/completions") -> list[Asked]:
        return [request for request in self.requests if request.path == path]

    def __enter__(self) -> Endpoint:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(1)
        if not first.isalpha():  # no HTTP, but a TLS client
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            return
        rest = await reader.readuntil(b"\r\n\r\n")
        head = (first + rest).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append(Asked(method, path, headers, json.loads(body) if body else None))
        waiting = self._replies.get(path) or [Reply.json({"error": {"message": "no page"}}, 404)]
        reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if reply.stall == "before":
            await self._wait_for_the_end(reader)
            return
        lines = [f"HTTP/1.1 {reply.status} X", f"content-type: {reply.kind}", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in reply.headers.items()]
        lines += ["transfer-encoding: chunked", "", ""]
        writer.write("\r\n".join(lines).encode())
        for at, part in enumerate(reply.parts):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            if at == 0 and reply.pause is not None:
                await asyncio.to_thread(reply.pause.wait, 10)
        if reply.stall == "after":
            await self._wait_for_the_end(reader)
        elif not reply.drop:
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _wait_for_the_end(self, reader: asyncio.StreamReader) -> None:
        self.stalled.set()
        with suppress(ConnectionError):
            await reader.read()
        self.gone.set()
