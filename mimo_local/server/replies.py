"""The answers as pydantic models: published in /openapi.json, checked by the tests.

The server itself writes plain dictionaries, which is quicker; these say what is in them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A document with these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(Strict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is an error."""

    error: ErrorBody


class CachedTokens(Strict):
    """Of the prompt's tokens, those that were not processed again."""

    cached_tokens: int


class ReasoningTokens(Strict):
    """Of the answer's tokens, those of the thinking."""

    reasoning_tokens: int


class Usage(Strict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class Timings(Strict):
    """Speeds, under llama-server's names."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class TopToken(Strict):
    """A token and its logprob."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopToken):
    """A token of the answer."""

    top_logprobs: list[TopToken]


class Logprobs(Strict):
    """Logprobs of the answer's tokens, thinking and calls left out."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Strict):
    """Arguments: a JSON object as text."""

    name: str
    arguments: str


class CallOut(Strict):
    """A call the model wants made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Strict):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[CallOut] | None = None


class ChatChoice(Strict):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Reply(Strict):
    """What all whole answers begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    timings: Timings


class ChatReply(Reply):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CallDelta(CallOut):
    """A call in a chunk: always a whole one."""

    index: int


class Delta(Strict):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(Strict):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Strict):
    """One event of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class LegacyLogprobs(Strict):
    """Logprobs in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Strict):
    """One continuation."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChunkText(Strict):
    """What a chunk adds to one continuation."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Strict):
    """One event of a streamed continuation."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkText]
    usage: Usage | None = None
    timings: Timings | None = None


class Model(Strict):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    description: str
    context_length: int
    version: str


class ModelList(Strict):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]


class Health(Strict):
    """The model can answer."""

    status: Literal["ok"]
    model: str
    running: int
    waiting: int


class NotReady(ErrorReply):
    """The model cannot answer: how far it is."""

    status: Literal["loading", "stopping"]
    stage: str
    done: int
    total: int
    unit: str


class InputTokens(Strict):
    """Tokens of a chat's prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class Tokens(Strict):
    """Ids of a text."""

    tokens: list[int]


class Content(Strict):
    """Text of ids."""

    content: str
