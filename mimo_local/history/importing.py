"""Chats out of JSON of three kinds: our own export, OpenAI messages, a ChatGPT export.

Nothing is believed: every value is checked, and what cannot be a chat is refused with its place in
the file. Knows no database; called by store, which saves all of an import or nothing.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeGuard, cast

from mimo_local.chat import PRESETS, Attachment, Message, Role, ToolCall
from mimo_local.errors import HistoryError
from mimo_local.history.export import FORMAT, VERSION

MOST_MESSAGES: Final = 1_000_000
"""Of one import: more is an attack or a mistake."""
ROLES: Final = ("system", "user", "assistant", "tool")
_KINDS: Final = (
    "an export of `mimo history export --json`, a list of OpenAI messages, "
    "or the conversations.json of a ChatGPT export"
)


@dataclass(slots=True)
class Entry:
    """A message to be saved; `parent` counts in the list, and comes before it."""

    message: Message
    parent: int | None
    created: float
    stats: dict[str, Any] = field(default_factory=dict)
    model: str = ""


@dataclass(slots=True)
class Imported:
    """A chat to be saved."""

    messages: list[Entry]
    leaf: int = -1
    """Index of the message where the active branch ends."""
    title: str = ""
    system: str = ""
    preset: str = "chat"
    thinking: bool = False
    model: str = ""
    created: float = 0.0
    updated: float = 0.0


def chats(data: Any) -> list[Imported]:
    """The chats in parsed JSON; HistoryError says what is wrong where."""
    found = _chats(data)
    if sum(len(chat.messages) for chat in found) > MOST_MESSAGES:
        raise HistoryError(
            f"the file holds more than {MOST_MESSAGES:,} messages", hint="import it in parts"
        )
    for chat in found:
        times = [entry.created for entry in chat.messages] or [time.time()]
        chat.created = chat.created or min(times)
        chat.updated = chat.updated or max(times)
    return found


def _chats(data: Any) -> list[Imported]:
    if _object(data) and isinstance(data.get("chats"), list):
        data = data["chats"]
    if _object(data):
        return [_chat(data, "the file")]
    if not isinstance(data, list):
        raise _wrong("the file", f"is neither an object nor a list; expected {_KINDS}")
    if not data:
        raise _wrong("the file", "is an empty list: there is nothing in it to import")
    if all(_object(item) and "role" in item for item in data):
        return [_openai({"messages": data}, "the file")]
    found = [_chat(item, f"chat {i}") for i, item in enumerate(data, 1)]
    return [chat for chat in found if chat.messages] or found[:0]


def _chat(data: Any, where: str) -> Imported:
    if not _object(data):
        raise _wrong(where, f"is no object; expected {_KINDS}")
    if data.get("format") == FORMAT:
        return _ours(data, where)
    if _object(data.get("mapping")):
        return _chatgpt(data, where)
    if isinstance(data.get("messages"), list):
        return _openai(data, where)
    raise _wrong(where, f"is none of: {_KINDS}")


# -- our own ---------------------------------------------------------------------------------------


def _ours(data: dict[str, Any], where: str) -> Imported:
    if data.get("version") != VERSION:
        raise HistoryError(
            f"{where} is an export of version {data.get('version')!r}, this one reads {VERSION}",
            hint="update mimo-local",
        )
    places: dict[Any, int] = {}
    entries: list[Entry] = []
    for i, item in enumerate(_list(data, "messages", where), 1):
        here = f"{where}, message {i}"
        if not _object(item):
            raise _wrong(here, "is no object")
        identity, parent = item.get("id"), item.get("parent")
        if not isinstance(identity, int) or identity in places:
            raise _wrong(here, "has no `id` of its own, a whole number")
        if parent is not None and (not isinstance(parent, int) or parent not in places):
            raise _wrong(here, "has a `parent` that is not the `id` of an earlier message")
        places[identity] = len(entries)
        stats = item.get("stats") or {}
        if not _object(stats):
            raise _wrong(here, "has `stats` that are no object")
        entries.append(
            Entry(
                _message(item, here),
                None if parent is None else places[parent],
                _seconds(item.get("created"), here),
                _figures(stats),
                _text(item, "model", here),
            )
        )
    leaf = data.get("leaf")
    if leaf is not None and (not isinstance(leaf, int) or leaf not in places):
        raise _wrong(where, "has a `leaf` that is not the `id` of a message")
    return Imported(
        entries,
        len(entries) - 1 if leaf is None else places[leaf],
        _text(data, "title", where),
        _text(data, "system", where),
        _preset(data),
        data.get("thinking") is True,
        _text(data, "model", where),
        _seconds(data.get("created"), where),
        _seconds(data.get("updated"), where),
    )


def _preset(data: dict[str, Any]) -> str:
    name = data.get("preset")
    return name if isinstance(name, str) and name in PRESETS else "chat"


def _figures(stats: dict[str, Any]) -> dict[str, Any]:
    """Numbers and short texts; anything else has no business there."""
    return {
        name: value
        for name, value in stats.items()
        if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
        if len(str(value)) < 100
    }


# -- OpenAI ----------------------------------------------------------------------------------------


def _openai(data: dict[str, Any], where: str) -> Imported:
    chat = Imported([], model=_text(data, "model", where), title=_text(data, "title", where))
    now = time.time()
    for i, item in enumerate(_list(data, "messages", where), 1):
        here = f"{where}, message {i}"
        if not _object(item):
            raise _wrong(here, "is no object")
        message = _message(item, here)
        if message.role == "system" and not chat.messages:
            chat.system = "\n\n".join(filter(None, (chat.system, message.content)))
            continue
        parent = len(chat.messages) - 1
        chat.messages.append(Entry(message, parent if parent >= 0 else None, now))
    if not chat.messages:
        raise _wrong(where, "has no messages of a user or an assistant")
    return chat


def _message(item: dict[str, Any], where: str) -> Message:
    """A message of ours or of OpenAI's; ours has attachments and reasoning too."""
    role = item.get("role")
    role = "system" if role == "developer" else "tool" if role == "function" else role
    if role not in ROLES:
        raise _wrong(where, f"has the role {role!r}; expected {', '.join(ROLES)}")
    reasoning = _text(item, "reasoning", where) or _text(item, "reasoning_content", where)
    return Message(
        cast(Role, role),
        _content(item.get("content"), where),
        reasoning,
        tuple(_attachment(file, where) for file in _list(item, "attachments", where)),
        tuple(_call(call, where) for call in _list(item, "tool_calls", where)),
        _text(item, "tool_call_id", where),
    )


def _content(content: Any, where: str) -> str:
    """Text, or the text of parts; of a part without text (a picture) its type is kept."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong(where, "has a `content` that is no text")
    parts: list[str] = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif _object(part) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif _object(part):
            parts.append(f"[{str(part.get('type') or part.get('content_type'))[:40]}]")
        else:
            raise _wrong(where, "has a part of its `content` that is no text")
    return "\n\n".join(part for part in parts if part)


def _attachment(file: Any, where: str) -> Attachment:
    if not _object(file):
        raise _wrong(where, "has an attachment that is no object")
    return Attachment(_text(file, "name", where), _text(file, "text", where))


def _call(call: Any, where: str) -> ToolCall:
    if not _object(call):
        raise _wrong(where, "has a tool call that is no object")
    function = call["function"] if _object(call.get("function")) else call
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not _object(parsed):  # the chat template wants an object
        raise _wrong(where, "has a tool call whose `arguments` are no JSON object")
    return ToolCall(_text(call, "id", where), _text(function, "name", where), arguments)


# -- ChatGPT ---------------------------------------------------------------------------------------


def _chatgpt(data: dict[str, Any], where: str) -> Imported:
    """A conversation of the export: a tree of nodes, of which those with text to read are kept."""
    mapping: dict[str, Any] = data["mapping"]
    chat = Imported(
        [],
        title=_text(data, "title", where),
        model=_text(data, "default_model_slug", where),
        created=_seconds(data.get("create_time"), where),
        updated=_seconds(data.get("update_time"), where),
    )
    # Node -> the message its children attach to: its own, or that of the nearest kept one above;
    # and the thinking that waits for the answer below it.
    places: dict[str, int | None] = {}
    thoughts: dict[str, str] = {}
    for start in mapping:
        for name in reversed(_unplaced(mapping, start, places, where)):
            node = mapping[name]
            above = node.get("parent")
            above = above if isinstance(above, str) and above in mapping else ""
            parent, thought = places.get(above), thoughts.get(above, "")
            entry = _node(node.get("message"), parent, f"{where}, node {name[:40]!r}")
            if entry is None or not entry.message.content.strip():
                own = entry.message.reasoning if entry else ""
                places[name] = parent
                thoughts[name] = "\n\n".join(filter(None, (thought, own)))
                continue
            if entry.message.role == "assistant":
                entry.message = replace(entry.message, reasoning=thought)
            entry.created = entry.created or chat.created
            places[name] = len(chat.messages)
            chat.messages.append(entry)
    current = data.get("current_node")
    leaf = places.get(current) if isinstance(current, str) else None
    chat.leaf = len(chat.messages) - 1 if leaf is None else leaf
    return chat


def _unplaced(
    mapping: dict[str, Any], start: str, places: dict[str, int | None], where: str
) -> list[str]:
    """From this node upwards, those not yet placed; a cycle is refused."""
    path: list[str] = []
    seen: set[str] = set()
    name: Any = start
    while isinstance(name, str) and name in mapping and name not in places:
        if name in seen or not _object(mapping[name]):
            raise _wrong(f"{where}, node {name[:40]!r}", "is no node, or above itself")
        seen.add(name)
        path.append(name)
        name = mapping[name].get("parent")
    return path


def _node(message: Any, parent: int | None, where: str) -> Entry | None:
    """The message of a node; None for what a reader never saw: system notes, tool output."""
    if not _object(message):
        return None
    author, content = message.get("author"), message.get("content")
    meta = message["metadata"] if _object(message.get("metadata")) else {}
    role = author.get("role") if _object(author) else None
    if role not in ("user", "assistant") or not _object(content):
        return None
    # An assistant's message to a tool is not for the reader.
    if meta.get("is_visually_hidden_from_conversation") or message.get("recipient", "all") != "all":
        return None
    kind, reasoning, text = content.get("content_type"), "", ""
    if kind == "thoughts":
        thoughts = [t for t in _list(content, "thoughts", where) if _object(t)]
        reasoning = "\n\n".join(_text(t, "content", where) for t in thoughts)
    elif kind in ("text", "multimodal_text", "code"):
        text = _content(content.get("parts") or content.get("text"), where)
    if not text.strip() and not reasoning.strip():
        return None
    return Entry(
        Message(cast(Role, role), text, reasoning),
        parent,
        _seconds(message.get("create_time"), where),
        model=_text(meta, "model_slug", where),
    )


# -- values ----------------------------------------------------------------------------------------


def _object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _list(data: dict[str, Any], key: str, where: str) -> list[Any]:
    value = data.get(key)
    if value is not None and not isinstance(value, list):
        raise _wrong(where, f"has a `{key}` that is no list")
    return value or []


def _text(data: dict[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(where, f"has a `{key}` that is no text")
    return value or ""


def _seconds(value: Any, where: str) -> float:
    """A time as seconds or in ISO form; 0 where none is given."""
    if value is None:
        return 0.0
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        else:
            seconds = float(value) if not isinstance(value, bool) else math.nan
        datetime.fromtimestamp(seconds, UTC)  # what cannot be shown is no time
    except (TypeError, ValueError, OverflowError, OSError):
        raise _wrong(where, f"has a time that is none: {str(value)[:40]!r}") from None
    return max(seconds, 0.0)


def _wrong(where: str, what: str) -> HistoryError:
    return HistoryError(f"{where} {what}", hint=f"nothing was imported; readable are {_KINDS}")
