"""Rows of the history's tables as messages and chats, and back.

Knows the columns, and no transaction; called by store.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final

from mimo_local.chat import Attachment, Message, ToolCall
from mimo_local.events import Stats
from mimo_local.history import words
from mimo_local.history.types import ChatInfo, Stored

INFO: Final = """
SELECT c.id, c.title, c.created, c.updated, c.system, c.preset, c.thinking, c.model,
    (SELECT count(*) FROM messages m WHERE m.chat = c.id),
    (SELECT count(*) - count(DISTINCT m.parent) FROM messages m WHERE m.chat = c.id)
FROM chats c"""
STORED: Final = """
SELECT m.id, m.parent, m.role, m.content, m.reasoning, m.attachments, m.tool_calls, m.tool_call_id,
    m.created, m.stats, m.model
FROM messages m"""


def insert(
    db: sqlite3.Connection,
    chat: int,
    message: Message,
    parent: int | None,
    stats: dict[str, Any],
    model: str,
    created: float,
) -> int:
    """The row of a message inside a transaction, and what it changes in its chat's row."""
    (turn,) = db.execute(
        "UPDATE chats SET turn = turn + 1, updated = ?, model = iif(? = '', model, ?)"
        " WHERE id = ? RETURNING turn",
        (created, model, clean(model), chat),
    ).fetchone()
    done = db.execute(
        "INSERT INTO messages(chat, parent, used, created, role, model, stats, tool_call_id,"
        " tool_calls, files, content, reasoning, attachments)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(chat, parent, turn, created, message.role, clean(model), json.dumps(stats)),
            *columns(message),
        ),
    )
    new = int(done.lastrowid or 0)
    db.execute("UPDATE chats SET leaf = ? WHERE id = ?", (new, chat))
    if message.role == "user":
        names = [attachment.name for attachment in message.attachments]
        title = words.title(clean("\n".join([message.content, *names])))
        db.execute("UPDATE chats SET title = ? WHERE id = ? AND title = ''", (title, chat))
    return new


def figures(stats: Stats | None) -> dict[str, Any]:
    """What is kept of an answer's figures."""
    if stats is None:
        return {}
    names = (
        *("prompt_tokens", "cached_tokens", "completion_tokens", "prefill_s", "decode_s"),
        *("context_used", "context_limit", "kernel"),
    )
    return {name: getattr(stats, name) for name in names}


def clean(text: str) -> str:
    """Text sqlite can store: half of a surrogate pair, as JSON may hold it, becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def columns(message: Message) -> tuple[str, ...]:
    """A message's columns from tool_call_id on."""
    calls = [[call.id, call.name, call.arguments] for call in message.tool_calls]
    files = [[attachment.name, attachment.text] for attachment in message.attachments]
    return (
        clean(message.tool_call_id),
        clean(json.dumps(calls, ensure_ascii=False)),
        clean("\n".join(name for name, _ in files)),
        clean(message.content),
        clean(message.reasoning),
        clean(json.dumps(files, ensure_ascii=False)),
    )


def info(row: Any) -> ChatInfo:
    """A row of INFO."""
    identity, title, created, updated, system, preset, thinking, model, messages, branches = row
    return ChatInfo(
        *(identity, title, created, updated, system, preset),
        *(bool(thinking), model, messages, branches),
    )


def stored(row: Any) -> Stored:
    """A row of STORED."""
    identity, parent, role, content, reasoning, files, calls, call_id, created, stats, model = row
    message = Message(
        role,
        content,
        reasoning,
        tuple(Attachment(*file) for file in json.loads(files)),
        tuple(ToolCall(*call) for call in json.loads(calls)),
        call_id,
    )
    return Stored(identity, parent, message, created, json.loads(stats), model)
