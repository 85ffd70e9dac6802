"""A stream of text as the parts of an answer: thinking, answer, calls of functions.

Knows a model's `<think>` and `<tool_call>` markup; no message, no engine and no prompt: what the
prompt spells is never looked at. Called by `chat`, `summarize` and the server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from mimo_local.tool_calls import ToolCall, parse


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, and which part of it."""

    kind: Literal["thinking", "answer"]
    text: str


Part: TypeAlias = Piece | ToolCall


class Splitter:
    """Splits a stream into its parts; no part of a tag ever comes out.

    Only a stream that begins with `<think>` (or whose prompt ended with one: `opened`) thinks; a
    tag later on is ordinary text. Space around the thinking is dropped, and so is empty thinking.
    With `tools`, a call comes out whole when its end is there, also one that was written while
    thinking; space around calls is dropped. Without tools `<tool_call>` is ordinary text.
    """

    OPEN: Final = "<think>"
    CLOSE: Final = "</think>"
    CALL: Final = "<tool_call>"
    CALL_END: Final = "</tool_call>"

    def __init__(self, *, opened: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.mode: Literal["start", "thinking", "answer"] = "thinking" if opened else "start"
        """What comes next, as far as it is known."""
        self.unfinished = ""
        """A call (or a tag) that the end of the stream cut off, as it was written."""
        self._tools = tools
        self._held = ""
        self._space = ""
        """Space before a call, should it turn out to be none."""
        self._call: _Call | None = None
        self._trim = opened
        """Drop space until the next text: after a tag."""

    @property
    def calling(self) -> bool:
        """Whether a call is being written."""
        return self._call is not None

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        if self.mode == "start":
            self._begin()
        while self.mode != "start" and self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """End of the stream: what was held back."""
        parts: list[Part] = []
        if self._call is not None:
            calls = parse(self._held, self._tools) if self._call.whole(self._held) else []
            parts += calls
            self.unfinished = "" if calls else self.CALL + self._held
            self._call, self._held = None, ""
            return parts
        text, self._held = self._held, ""
        if self._tools and (cut := _tail(text, self.CALL)) > CUT_TAG:
            text, self.unfinished = text[:-cut], text[-cut:]
        if self.mode == "start":
            self.mode = "answer"
        return [*self._pieces(text.rstrip() if self.mode == "thinking" else text)]

    def _begin(self) -> None:
        """Leave the start as soon as the first text is known to be the tag or not."""
        text = self._held.lstrip()
        if text.startswith(self.OPEN):
            self._held = text[len(self.OPEN) :]
            self.mode, self._trim = "thinking", True
        elif text and not self.OPEN.startswith(text):
            self.mode = "answer"

    def _step(self, parts: list[Part]) -> bool:
        """Move on by one tag; whether there may be more to do."""
        if self._call is not None:
            return self._go_on_with_the_call(parts)
        if self.mode == "answer" and not self._tools:
            parts += self._pieces(self._held)
            self._held = ""
            return False
        tags = [self.CLOSE] * (self.mode == "thinking") + [self.CALL] * bool(self._tools)
        found = re.search("|".join(map(re.escape, tags)), self._held)
        body = self._held[: found.start()] if found else self._held
        if not found:
            body = body[: len(body) - max(_tail(body, tag) for tag in tags)]
        # Space at the end waits: a tag may follow, and it goes with the tag.
        text = body.rstrip()
        parts += self._pieces(text)
        if not found:
            self._held = self._held[len(text) :]
            return False
        self._held = self._held[found.end() :]
        if found.group() == self.CLOSE:
            self.mode, self._trim = "answer", True
        else:
            self._space, self._call = body[len(text) :], _Call(thinking=self.mode == "thinking")
        return True

    def _go_on_with_the_call(self, parts: list[Part]) -> bool:
        call = self._call
        assert call is not None
        likely = call.likely(self._held)
        if likely is None:
            return False
        end = call.end(self._held) if likely else None
        if likely and end is None:
            return False
        self._call = None
        calls = parse(self._held[: end.start()], self._tools) if end else []
        if end is None or not calls:
            # The model speaks about the markup: nothing of that is lost.
            upto = end.start() if end else 0
            parts += self._pieces(self._space + self.CALL + self._held[:upto])
            self._held = self._held[upto:]
            if self._held.startswith(self.CALL_END):
                parts += self._pieces(self.CALL_END)
                self._held = self._held[len(self.CALL_END) :]
            return True
        parts += calls
        self._trim = True
        self._held = self._held[end.start() :].removeprefix(self.CALL_END)
        return True

    def _pieces(self, text: str) -> list[Piece]:
        """No piece or one, of the present mode."""
        if self._trim:
            text = text.lstrip()
        if not text:
            return []
        self._trim = False
        return [Piece("thinking" if self.mode == "thinking" else "answer", text)]


CUT_TAG: Final = 4
"""More characters of `<tool_call>` than this at the end of a stream are no text somebody meant."""


class _Call:
    """Looks for the end of a call in text that grows; a tag inside a value does not end it."""

    def __init__(self, *, thinking: bool) -> None:
        ends = [Splitter.CALL_END, Splitter.CLOSE] if thinking else [Splitter.CALL_END]
        self._look = re.compile("|".join([*map(re.escape, ends), r'["\\]']))
        self._json: bool | None = None
        self._at, self._in_text = 0, False

    def likely(self, body: str) -> bool | None:
        """Whether this begins as calls do; None: too early to say."""
        if self._json is None:
            text = body.lstrip()
            if text.startswith("<function="):
                self._json = False
            elif text and not "<function=".startswith(text):
                if text[0] not in "{[":
                    return False
                self._json = True
        return None if self._json is None else True

    def end(self, body: str) -> re.Match[str] | None:
        """The tag that ends the call."""
        while (found := self._look.search(body, self._at)) is not None:
            self._at = found.end()
            match found.group():
                case '"':
                    self._in_text = not self._in_text
                case "\\":
                    self._at += 1
                case _ if self.complete(body[: found.start()]):
                    return found
        # What is left holds at most the beginning of a tag.
        self._at = max(self._at, len(body) - len(Splitter.CALL_END))
        return None

    def whole(self, body: str) -> bool:
        """Whether the call is all there but for its closing tag."""
        return self.complete(body) and (self._json is True or "</function>" in body)

    def complete(self, body: str) -> bool:
        """Whether no value is open at the end of `body`."""
        if self._json:
            return not self._in_text
        return body.rfind("</parameter>") >= body.rfind("<parameter=")


def answer_text(parts: Sequence[Part]) -> str:
    """The answer alone."""
    return "".join(p.text for p in parts if isinstance(p, Piece) and p.kind == "answer")


def _tail(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
