"""The chunks of one answer to events: text, thinking, progress, the end and its figures.

Takes what vLLM, SGLang, llama-server, `mimo serve` and hosted endpoints send. Thinking that comes
in a field of its own is put between `<think>` and `</think>`, as the model wrote it: whoever reads
a local engine's stream reads this one. Knows no network; called by `backend`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from mimo_local.errors import RemoteError
from mimo_local.events import Done, FinishReason, Prefill, Stats, Token
from mimo_local.stream import NO_ID

OPEN, CLOSE = "<think>", "</think>"
REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "function_call": "stop",
    "content_filter": "stop",
}
"""Any other end is a `stop` too, with a note."""


class Reading:
    """Reads one answer: `comment` and `data` as they come, then `done`."""

    def __init__(
        self,
        *,
        thinking: bool,
        prompt_tokens: int,
        context_limit: int,
        where: str,
        note: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prompt_tokens`: an estimate, until the server says how many there were.

        `note`: told what the user should hear, before the answer's last event.
        """
        self.finished = False
        """Whether the server has said why the answer ended."""
        self._note = note
        self._thinking, self._context_limit, self._where = thinking, context_limit, where
        self._prompt_tokens, self._cached, self._pieces = prompt_tokens, 0, 0
        self._completion_tokens: int | None = None
        self._clock, self._asked, self._first = clock, clock(), 0.0
        self._reason: FinishReason = "stop"
        self._at = "start"  # then perhaps "thinking", then "answer"
        self._held = ""
        self._progress = (0, 0.0)

    def comment(self, text: str) -> Iterator[Prefill]:
        """`prefill 1024/8192` is progress; other comments only keep the connection open."""
        found = re.fullmatch(r"(?:prefill|keepalive) (\d{1,12})/(\d{1,12})", text)
        if found and not self._pieces:
            yield from self._read(int(found[1]), int(found[2]))

    def data(self, text: str) -> Iterator[Prefill | Token]:
        """One chunk; RemoteError if the server reports one, or sends what is no chunk."""
        if text.strip() == "[DONE]":
            self.finished = True
            return
        try:
            chunk = json.loads(text)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise RemoteError(
                f"{self._where} sent something that is no chunk of an answer: {shown(text)}",
                hint="the address must be that of an OpenAI-compatible server",
            )
        yield from self.chunk(chunk)

    def chunk(self, chunk: dict[str, Any]) -> Iterator[Prefill | Token]:
        """The same, parsed: a chunk of a stream, or a whole answer."""
        if chunk.get("error"):
            raise RemoteError(
                f"{self._where} failed while answering: {reported(chunk)}",
                hint="ask again; the server's log says more",
            )
        progress = chunk.get("prompt_progress")  # llama-server
        if isinstance(progress, dict) and not self._pieces:
            yield from self._read(_count(progress.get("processed")), _count(progress.get("total")))
        self._usage(chunk.get("usage"))
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and choice.get("index", 0) == 0:
                yield from self._choice(choice)

    def done(self, *, cancelled: bool = False) -> Iterator[Token | Done]:
        """What was held back, and the end."""
        if self._held:
            if not cancelled:
                self._note(
                    f"{self._where} sent the answer as thinking, which was off: its reasoning "
                    "parser does not fit the model"
                )
            yield self._token(self._held)
            self._held = ""
        now = self._clock()
        first = self._first or now
        completion = self._completion_tokens
        completion = self._pieces if completion is None else completion
        used = self._prompt_tokens + completion
        if self._reason == "length" and self._context_limit and used >= self._context_limit:
            self._reason = "context"
        yield Done(
            "cancelled" if cancelled else self._reason,
            Stats(
                prompt_tokens=self._prompt_tokens,
                cached_tokens=min(self._cached, self._prompt_tokens),
                completion_tokens=completion,
                prefill_s=first - self._asked,
                decode_s=now - first,
                context_used=used,
                context_limit=self._context_limit,
                kernel=f"remote {self._where}",
            ),
        )

    @property
    def begun(self) -> bool:
        """Whether any of the answer has come."""
        return self._pieces > 0

    # ---- details ---------------------------------------------------------------------------------

    def _read(self, done: int, total: int) -> Iterator[Prefill]:
        if not total > 0 or not 0 <= done <= total:
            return
        before, then = self._progress
        now = self._clock()
        rate = (done - before) / (now - then) if then and now > then and done > before else 0.0
        self._progress = (done, now)
        self._prompt_tokens = total
        yield Prefill(done, total, rate)

    def _usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        self._prompt_tokens = _count(usage.get("prompt_tokens"), self._prompt_tokens)
        if "completion_tokens" in usage:
            self._completion_tokens = _count(usage["completion_tokens"], self._pieces)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self._cached = _count(details.get("cached_tokens"))

    def _choice(self, choice: dict[str, Any]) -> Iterator[Prefill | Token]:
        delta = choice.get("delta") or choice.get("message") or {}
        if isinstance(delta, dict):
            # Some releases send both fields, with the same text.
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            text = delta.get("content") or delta.get("refusal")
            if isinstance(thought, str) and thought:
                yield from self._think(thought)
            if isinstance(text, str) and text:
                yield from self._say(text)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finished = True
            self._reason = REASONS.get(reason, "stop")
            if reason == "content_filter":
                self._note(f"the content filter of {self._where} ended the answer")
            elif reason not in REASONS:
                self._note(f"{self._where} ended the answer: {shown(reason)}")

    def _think(self, text: str) -> Iterator[Prefill | Token]:
        yield from self._begin()
        if self._at == "answer":
            # No model here thinks twice; if one does, its words are shown as it wrote them.
            yield self._token(f"{OPEN}{text}{CLOSE}")
        elif not self._thinking:
            # Known of SGLang with this model: with thinking off, all of the answer is in here.
            # Only the text after it, or its absence, tells which it was.
            self._held += text
            self._pieces += 1
        else:
            opening = OPEN if self._at == "start" else ""
            self._at = "thinking"
            yield self._token(opening + text)

    def _say(self, text: str) -> Iterator[Prefill | Token]:
        yield from self._begin()
        if self._held:
            yield Token(NO_ID, f"{OPEN}{self._held}{CLOSE}")
            self._held = ""
        closing = CLOSE if self._at == "thinking" else ""
        self._at = "answer"
        yield self._token(closing + text)

    def _begin(self) -> Iterator[Prefill]:
        """The first piece is the end of reading."""
        if not self._first:
            self._first = self._clock()
            if self._prompt_tokens:
                yield Prefill(self._prompt_tokens, self._prompt_tokens)

    def _token(self, text: str) -> Token:
        self._pieces += 1
        return Token(NO_ID, text)


def _count(value: Any, otherwise: int = 0) -> int:
    """A number of tokens; what is none is `otherwise`."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if ok else otherwise


def reported(body: Any) -> str:
    """The message in an error's body, in any of the shapes servers use."""
    found = body
    for name in ("error", "message", "detail", "msg"):
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return shown(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))


def shown(text: str, longest: int = 300) -> str:
    """A stranger's text as one short line: no control characters, no page of HTML."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
