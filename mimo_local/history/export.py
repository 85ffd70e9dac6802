"""A saved chat as Markdown for people, or as JSON that holds all of it.

Knows no database; called by store. The JSON is read back by importing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from mimo_local.history.types import ChatInfo, Stored

FORMAT: Final = "mimo-chat"
VERSION: Final = 1
NAMES: Final = {"user": "You", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text of several lines that does nothing to a terminal: control characters are left out."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def markdown(chat: ChatInfo, messages: Sequence[Stored]) -> str:
    """One branch: a heading per message, thinking folded away, documents by name."""
    made = datetime.fromtimestamp(chat.created).astimezone()
    facts = [f"{made:%Y-%m-%d %H:%M}", *filter(None, (chat.model, f"preset {chat.preset}"))]
    parts = [f"# {visible(chat.title) or 'Chat'}", f"*{visible(', '.join(facts))}*"]
    if chat.system:
        parts += ["## System", visible(chat.system)]
    for stored in messages:
        parts += _message(stored)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _message(stored: Stored) -> list[str]:
    message = stored.message
    parts = [f"## {NAMES[message.role]}"]
    parts += [
        f"*Document {visible(a.name)}, {len(a.text):,} characters*" for a in message.attachments
    ]
    if message.reasoning:
        parts.append(
            "<details><summary>Thinking</summary>\n\n"
            f"{visible(message.reasoning).strip()}\n\n</details>"
        )
    if message.content:
        parts.append(visible(message.content))
    for call in message.tool_calls:
        parts.append(f"Calls `{visible(call.name)}`:\n\n{_fence(visible(call.arguments), 'json')}")
    return parts


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def document(chat: ChatInfo, messages: Sequence[Stored], leaf: int | None) -> dict[str, Any]:
    """Everything, as `import_chats` reads it. `leaf`: where the active branch ends."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": chat.title,
        "created": _iso(chat.created),
        "updated": _iso(chat.updated),
        "system": chat.system,
        "preset": chat.preset,
        "thinking": chat.thinking,
        "model": chat.model,
        "leaf": leaf,
        "messages": [_entry(stored) for stored in messages],
    }


def _entry(stored: Stored) -> dict[str, Any]:
    message = stored.message
    return {
        "id": stored.id,
        "parent": stored.parent,
        "role": message.role,
        "content": message.content,
        "reasoning": message.reasoning,
        "attachments": [{"name": a.name, "text": a.text} for a in message.attachments],
        "tool_calls": [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ],
        "tool_call_id": message.tool_call_id,
        "created": _iso(stored.created),
        "stats": stored.stats,
        "model": stored.model,
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
