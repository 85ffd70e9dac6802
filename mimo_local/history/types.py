"""What the history hands out: plain frozen data. Times are seconds since 1970, UTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mimo_local.chat import Message

MARKS: Final = ("\x02", "\x03")
"""Around each match in `Hit.snippet`; no other control character is in it."""


@dataclass(frozen=True, slots=True)
class ChatInfo:
    """A saved chat without its messages."""

    id: int
    title: str
    created: float
    updated: float
    """When a message was last added or changed."""
    system: str
    preset: str
    thinking: bool
    model: str
    n_messages: int
    """In all branches."""
    n_branches: int
    """Ways from the first message to a last one."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A saved message and its place in the tree."""

    id: int
    parent: int | None
    message: Message
    created: float
    stats: dict[str, Any]
    """Tokens and seconds of an answer, named as in `events.Stats`; empty for other messages."""
    model: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A place where a search found something."""

    chat: ChatInfo
    message_id: int | None
    """None: it is the title."""
    snippet: str
    """One line around the first match; each match stands between `MARKS`."""
