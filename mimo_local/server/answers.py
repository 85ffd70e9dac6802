"""Answers being made: the engine's events to the pieces that OpenAI's clients read.

One `Choice` per answer. Knows no HTTP: what it returns are plain dictionaries, sent as chunks or
joined to a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mimo_local.answer_parts import Part, Piece, Splitter
from mimo_local.events import Done, Stats, Token
from mimo_local.stream import NO_ID

if TYPE_CHECKING:
    from mimo_local.server.translate import Asked


class Bytes(Protocol):
    """What logprobs need of a tokenizer."""

    def bytes_of(self, token: int) -> bytes:
        """What an id stands for."""


@dataclass
class Choice:
    """One answer of a chat: what has come of it, and what the next chunk tells."""

    index: int
    asked: Asked
    tokenizer: Bytes
    splitter: Splitter
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reasoning_tokens: int = 0
    finish: str | None = None
    stats: Stats = field(default_factory=Stats)
    enough: bool = False
    """The one call that may be made has come: the rest is not waited for."""
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    """Logprobs of tokens whose text is still held back."""

    def add(self, token: Token) -> list[dict[str, Any]]:
        """The deltas a token makes."""
        before = self.splitter.mode
        parts = self.splitter.push(token.text)
        after = self.splitter.mode
        self.reasoning_tokens += token.id != NO_ID and "thinking" in (before, after)
        shown = after != "thinking" and before != "thinking" and not self.splitter.calling
        if self.asked.logprobs is not None and token.logprob is not None and shown:
            self._waiting.append(entry(token, self.tokenizer))
        return self._deltas(parts)

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The last deltas; `finish` and `stats` are known then."""
        deltas = self._deltas(self.splitter.flush())
        if self._waiting and self.asked.logprobs is not None:
            deltas.append({"content": "", "logprobs": self._take()})
        self.stats = done.stats
        self.finish = "length" if done.reason in ("length", "context") else "stop"
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"
        return deltas

    def _deltas(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if self.enough:
                break
            if not isinstance(part, Piece):
                call = {
                    "id": part.id,
                    "type": "function",
                    "function": {"name": part.name, "arguments": part.arguments},
                }
                deltas.append({"tool_calls": [{"index": len(self.calls), **call}]})
                self.calls.append(call)
                self.enough = not self.asked.many_calls
            elif part.kind == "thinking":
                self.reasoning += part.text
                deltas.append({"reasoning_content": part.text})
            else:
                self.text += part.text
                delta: dict[str, Any] = {"content": part.text}
                if self._waiting:
                    delta["logprobs"] = self._take()
                deltas.append(delta)
        return deltas

    def _take(self) -> list[dict[str, Any]]:
        taken, self._waiting = self._waiting, []
        self.logprobs += taken
        return taken

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not self.text else self.text,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


@dataclass
class Continuation:
    """One answer of a completion."""

    index: int
    asked: Asked
    tokenizer: Bytes | None
    text: str = ""
    logprobs: dict[str, list[Any]] | None = None
    finish: str | None = None
    stats: Stats = field(default_factory=Stats)
    reasoning_tokens: int = 0
    enough: bool = False
    _at: int = 0
    _waiting: list[Token] = field(default_factory=list)

    def add(self, token: Token) -> list[dict[str, Any]]:
        """The deltas a token makes."""
        if self.asked.logprobs is not None and token.logprob is not None:
            self._waiting.append(token)
        return self._delta(token.text) if token.text else []

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The last deltas."""
        self.stats = done.stats
        self.finish = "length" if done.reason in ("length", "context") else "stop"
        return self._delta("") if self._waiting else []

    def _delta(self, text: str) -> list[dict[str, Any]]:
        self.text += text
        delta: dict[str, Any] = {"text": text}
        if self._waiting and self.tokenizer is not None:
            delta["logprobs"] = self._legacy(self._waiting, self.tokenizer)
            self._waiting = []
            if self.logprobs is None:
                self.logprobs = {key: [] for key in delta["logprobs"]}
            for key, values in delta["logprobs"].items():
                self.logprobs[key] += values
        return [delta]

    def _legacy(self, tokens: Sequence[Token], tokenizer: Bytes) -> dict[str, list[Any]]:
        """Logprobs in the older form: four lists."""
        found: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token in tokens:
            text = spelled(tokenizer.bytes_of(token.id))
            found["tokens"].append(text)
            found["token_logprobs"].append(finite(token.logprob))
            found["top_logprobs"].append(
                {spelled(tokenizer.bytes_of(i)): finite(value) for i, value in token.top}
            )
            found["text_offset"].append(len(self.asked.echo) + self._at)
            self._at += len(text)
        return found


def entry(token: Token, tokenizer: Bytes) -> dict[str, Any]:
    """A token and the likeliest ones with their logprobs."""
    top = [_one(i, value, tokenizer) for i, value in token.top]
    return _one(token.id, token.logprob, tokenizer) | {"top_logprobs": top}


def _one(token: int, logprob: float | None, tokenizer: Bytes) -> dict[str, Any]:
    data = tokenizer.bytes_of(token) if token != NO_ID else b""
    return {"token": spelled(data), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float | None) -> float:
    """A logprob as JSON can say it: OpenAI writes -9999 for what is all but impossible."""
    return max(-9999.0, logprob or 0.0)


def spelled(data: bytes) -> str:
    """A token as text; part of a character as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# ---- figures -------------------------------------------------------------------------------------


def usage(choices: Sequence[Choice | Continuation]) -> dict[str, Any]:
    """Tokens of a request. A prompt that is answered n times counts once."""
    prompts: dict[int, Stats] = {}
    for choice in choices:
        prompts.setdefault(id(choice.asked), choice.stats)
    prompt = sum(stats.prompt_tokens for stats in prompts.values())
    completion = sum(choice.stats.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(stats.cached_tokens for stats in prompts.values())
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)
        },
    }


def timings(stats: Stats) -> dict[str, Any]:
    """Speeds of an answer under llama-server's names, which its clients show."""
    new = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": new,
        "prompt_ms": round(1e3 * stats.prefill_s, 3),
        "prompt_per_second": round(stats.prefill_tokens_per_s, 3),
        "predicted_n": stats.completion_tokens,
        "predicted_ms": round(1e3 * stats.decode_s, 3),
        "predicted_per_second": round(stats.decode_tokens_per_s, 3),
    }
