"""/v1/chat/completions and /v1/completions: one request, its stream or its whole answer.

Translates events into documents; what a delta holds is `answers`' affair. Called by `app`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_local import __version__
from mimo_local.events import Done, Failed, Prefill, Token
from mimo_local.server import sse
from mimo_local.server.answers import Choice, Continuation, timings, usage
from mimo_local.server.failures import ApiError, of_mimo, unexpected
from mimo_local.server.feed import Feed
from mimo_local.server.reading import read
from mimo_local.server.schemas import ChatRequest, CompletionRequest, Sampling
from mimo_local.server.service import Service
from mimo_local.server.translate import Asked, asked_by_chat, asked_by_completion

Answer: TypeAlias = Choice | Continuation


@dataclass(frozen=True)
class Head:
    """What all documents of one answer begin with."""

    id: str
    created: int
    model: str
    chat: bool
    usage: bool
    """Whether the stream ends with the usage, as asked."""

    def document(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """A document with these choices."""
        kind = ("chat.completion" + ".chunk" * chunk) if self.chat else "text_completion"
        found: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"mimo-local-{__version__}",
            "choices": list(choices),
        }
        if chunk and self.usage:
            found["usage"] = None
        return found


def new_head(body: Sampling, model: str, *, chat: bool) -> Head:
    """The head of a new answer."""
    wanted = bool(body.stream_options and body.stream_options.include_usage)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    return Head(name, int(time.time()), model, chat, wanted)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.app.state.service
    body = await read(request, ChatRequest)
    model, engine, grammars = service.knows(body.model), service.ready(), service.grammars()
    with service.admit(body.n or 1):
        asked = await service.work(lambda: asked_by_chat(body, engine, grammars, service.options))
        tokenizer = engine.tokenizer
        assert tokenizer is not None  # asked_by_chat refuses otherwise
        answers: list[Answer] = [
            Choice(n, asked, tokenizer, asked.splitter(tokenizer)) for n in range(asked.n)
        ]
        feed = await service.start([asked])
    head = new_head(body, model, chat=True)
    return await _reply(request, feed, answers, head, stream=bool(body.stream))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service: Service = request.app.state.service
    body = await read(request, CompletionRequest)
    model, engine = service.knows(body.model), service.ready()
    asked: list[Asked] = await service.work(
        lambda: asked_by_completion(body, engine, service.options)
    )
    each = [one for one in asked for _ in range(one.n)]
    answers: list[Answer] = [
        Continuation(n, one, engine.tokenizer, one.echo) for n, one in enumerate(each)
    ]
    with service.admit(len(each)):
        feed = await service.start(asked)
    head = new_head(body, model, chat=False)
    return await _reply(request, feed, answers, head, stream=bool(body.stream))


async def count(request: Request) -> Response:
    """POST /v1/chat/completions/input_tokens: how long a chat's prompt is, without answering."""
    service: Service = request.app.state.service
    body = await read(request, ChatRequest)
    service.knows(body.model)
    engine, grammars = service.ready(), service.grammars()
    asked = await service.work(lambda: asked_by_chat(body, engine, grammars, service.options))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(asked.ids)})


async def _reply(
    request: Request, feed: Feed, answers: Sequence[Answer], head: Head, *, stream: bool
) -> Response:
    if stream:
        return sse.EventStream(_lines(feed, answers, head), feed.cancel)
    made = asyncio.create_task(_whole(feed, answers, head))
    gone = asyncio.create_task(sse.until_gone(request.receive))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(await made)
    finally:
        feed.cancel()
        for task in (made, gone):
            task.cancel()
        await asyncio.gather(made, gone, return_exceptions=True)


async def _whole(feed: Feed, answers: Sequence[Answer], head: Head) -> dict[str, Any]:
    async for item in feed:
        if item is None:
            continue
        index, event = item
        if isinstance(event, (Token, Done, Failed)):
            _take(feed, answers[index], event)
    choices = []
    for answer in answers:
        one: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish}
        if isinstance(answer, Choice):
            logprobs = answer.asked.logprobs is not None
            found = {"content": answer.logprobs, "refusal": None} if logprobs else None
            choices.append(one | {"message": answer.message(), "logprobs": found})
        else:
            choices.append(one | {"text": answer.text, "logprobs": answer.logprobs})
    document = head.document(choices, chunk=False)
    return document | {"usage": usage(answers), "timings": timings(answers[0].stats)}


async def _lines(feed: Feed, answers: Sequence[Answer], head: Head) -> AsyncIterator[bytes]:
    try:
        for answer in answers if head.chat else ():
            delta = {"role": "assistant", "content": ""}
            yield sse.data(head.document([_chunk(answer, delta)], chunk=True))
        for answer in () if head.chat else answers:
            if answer.asked.echo:
                text = {"text": answer.asked.echo}
                yield sse.data(head.document([_chunk(answer, text)], chunk=True))
        async for item in feed:
            if item is None:
                yield sse.comment("queued" if not feed.begun else "working")
                continue
            index, event = item
            if isinstance(event, Prefill):
                if event.done < event.total:
                    yield sse.comment(f"prefill {event.done}/{event.total}")
                continue
            answer = answers[index]
            for delta in _take(feed, answer, event):
                yield sse.data(head.document([_chunk(answer, delta)], chunk=True))
            if isinstance(event, Done):
                nothing: dict[str, Any] = {} if head.chat else {"text": ""}
                last = head.document([_chunk(answer, nothing)], chunk=True)
                last["choices"][0]["finish_reason"] = answer.finish
                yield sse.data(last | {"timings": timings(answer.stats)})
        if head.usage:
            yield sse.data(head.document([], chunk=True) | {"usage": usage(answers)})
        yield sse.DONE
    except ApiError as error:
        yield sse.data(error.body)
    except Exception as error:
        yield sse.data(unexpected(error).body)
        raise


def _chunk(answer: Answer, delta: dict[str, Any]) -> dict[str, Any]:
    """The choice of a chunk."""
    given = dict(delta)
    entries = given.pop("logprobs", None)
    choice: dict[str, Any] = {"index": answer.index, "finish_reason": None}
    if isinstance(answer, Choice):
        found = None if entries is None else {"content": entries, "refusal": None}
        return choice | {"delta": given, "logprobs": found}
    return choice | {"text": given["text"], "logprobs": entries}


def _take(feed: Feed, answer: Answer, event: Token | Done | Failed) -> list[dict[str, Any]]:
    """The deltas of an event; ApiError where the answer cannot be finished."""
    if isinstance(event, Failed):
        raise of_mimo(event.error)
    had_enough = answer.enough
    if isinstance(event, Token):
        deltas = [] if had_enough else answer.add(event)
        if answer.enough:
            feed.cancel(answer.index)
        return deltas
    if event.reason == "cancelled" and not had_enough:
        if feed.overflowed:
            raise ApiError(503, "the answer was read too slowly and given up", code="too_slow")
        raise ApiError(503, "the server is being stopped", code="stopping")
    return answer.end(event)
