"""Bytes of an event stream to its messages, however they were cut on the way.

httpx2 has a reader of its own, but it drops comments, and `mimo serve` reports the reading of a
prompt in them (`: prefill 1024/8192`). Knows no JSON and no network; called by `backend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

LONGEST: Final = 16 << 20
"""Bytes of one message: far above any chunk of an answer, so what is longer is no such stream."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One thing the server sent: the data of an event, or a comment."""

    kind: Literal["data", "comment"]
    text: str


class EventStream:
    """Push bytes, get messages: the same ones for every way of cutting the bytes.

    Lines end in LF, CR LF or CR. What is unfinished when the stream ends was never sent.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []
        self._held = 0
        self._after_cr = False
        self._begun = False

    def push(self, received: bytes) -> list[Sent]:
        """What is complete now. ValueError for a message that is longer than LONGEST."""
        if self._after_cr and received:
            received = received.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or received.endswith(b"\r")
        self._rest += received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        found = [sent for line in lines for sent in self._line(bytes(line))]
        if self._held + len(rest) > LONGEST:
            raise ValueError("a message without an end")
        return found

    def _line(self, line: bytes) -> list[Sent]:
        if not self._begun:
            self._begun, line = True, line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            data, self._data, self._held = self._data, [], 0
            return [Sent("data", "\n".join(data))] if data else []
        text = line.decode("utf-8", "replace")
        if text.startswith(":"):
            return [Sent("comment", text[1:].strip())]
        name, _, value = text.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
            self._held += len(line)
        elif name == "error":  # older llama-server
            self._data.append('{"error": ' + value.strip() + "}")
        return []
