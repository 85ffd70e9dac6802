"""Keeps what a plain chat or a single question said among the saved chats; finds one to go on with.

A history that cannot be opened or written is said once and then left alone: the answer matters
more. Called by `chat`, `answer` and `plain`; of these the only one that knows `history`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mimo_local.chat import Chat, Message
from mimo_local.cli.status import say
from mimo_local.errors import HistoryError, UsageError
from mimo_local.settings import Paths, Settings

if TYPE_CHECKING:
    from mimo_local.events import Stats
    from mimo_local.history import ChatInfo, History, Stored

T = TypeVar("T")


class Keeper:
    """Follows one `Chat` after another; each message is saved once, under the one before it."""

    def __init__(self, history: History | None = None, *, prompts: Path | None = None) -> None:
        """Without a `history` nothing is kept. `prompts`: the file of prompts typed before."""
        self.prompts = prompts
        self.chat: Chat | None = None
        """The chat to go on with, if there is one."""
        self._history = history
        self._id: int | None = None
        self._rows: list[tuple[Message, int]] = []
        self._options: tuple[str, str, bool] | None = None

    @classmethod
    def open(cls, settings: Settings, *, last: bool = False, number: int | None = None) -> Keeper:
        """As the settings want it, with the chat to go on with: the `last` one, or the `number`ed.

        UsageError or HistoryError if there is no such chat.
        """
        wanted = last or number is not None
        if not settings.history and not wanted:
            return cls()
        prompts = Paths.default().data_dir / "prompts" if settings.history else None
        try:
            history = _open()
        except HistoryError as error:
            if wanted:
                raise
            say(f"this chat is not saved: {error.message}\nhint: {error.hint}")
            return cls(prompts=prompts)
        keeper = cls(history, prompts=prompts)
        if wanted:
            keeper._resume(settings, number)
        if not settings.history:
            history.close()
            keeper._history = None
        return keeper

    @property
    def number(self) -> int | None:
        """Of the saved chat; None before its first message and where nothing is kept."""
        return self._id

    def new(self) -> None:
        """The next message begins another chat."""
        self._id, self.chat, self._rows = None, None, []

    def prompt(self, chat: Chat, model: str = "") -> None:
        """Save the chat's last message, unless it is there: a prompt that is asked again."""
        if self._row(chat.messages[-1]) is None:
            self._try(lambda history: self._add(history, chat, model))

    def answer(self, chat: Chat, stats: Stats, model: str) -> None:
        """Save the chat's last message, an answer."""
        self._try(lambda history: self._add(history, chat, model, stats))

    def versions(self, chat: Chat) -> list[tuple[int, Message, bool]]:
        """(row, message, whether it is in the chat) of the last answer's versions.

        Where there is one answer only, of the last prompt's; empty for a chat that is not saved.
        """
        found = self._try(lambda history: self._versions(history, chat))
        return found or []

    def choose(self, row: int) -> list[Message]:
        """Go on with the branch through a message: its messages; none if that failed."""
        number = self._id

        def change(history: History) -> list[Message]:
            assert number is not None
            history.choose(row)
            self._rows = [(found.message, found.id) for found in history.messages(number)]
            return [message for message, _ in self._rows]

        return self._try(change) or []

    def text(self, chat: Chat, form: str, model: str) -> str:
        """The chat as `markdown` or `json`, with all its branches if they are saved."""
        from mimo_local.history import export

        if self._history is not None and self._id is not None:
            number = self._id
            if form == "markdown":
                found = self._try(lambda history: history.export_markdown(number))
            else:
                found = self._try(lambda history: _json(history.export_json(number)))
            if found is not None:
                return found
        info, stored = _unsaved(chat, model)
        if form == "markdown":
            return export.markdown(info, stored)
        return _json(export.document(info, stored, stored[-1].id))

    def close(self) -> None:
        """Close the file."""
        if self._history is not None:
            self._history.close()

    # ---- details ---------------------------------------------------------------------------------

    def _resume(self, settings: Settings, number: int | None) -> None:
        assert self._history is not None
        info = _info(self._history, number)
        stored = self._history.messages(info.id)
        self._id, self._rows = info.id, [(found.message, found.id) for found in stored]
        own = {"system": info.system, "preset": info.preset, "thinking": info.thinking}
        typed = {
            "system": settings.system or "",
            "preset": settings.preset,
            "thinking": settings.think,
        }
        for name, setting in (("system", "system"), ("preset", "preset"), ("thinking", "think")):
            if settings.origin.get(setting) == "flag":
                own[name] = typed[name]
        messages = [found.message for found in stored]
        if messages and messages[-1].role == "user":
            say("the last prompt of this chat has no answer: it is left out")
            messages.pop()
        self.chat = Chat(
            messages=messages,
            system=str(own["system"]),
            preset=str(own["preset"]),
            thinking=bool(own["thinking"]),
            began=date.fromtimestamp(info.created),
        )
        say(f"going on with chat {info.id}: {info.title or 'untitled'}")

    def _row(self, message: Message) -> int | None:
        """Where a message is saved. By identity: the same words may be said twice."""
        return next((row for found, row in reversed(self._rows) if found is message), None)

    def _add(self, history: History, chat: Chat, model: str, stats: Stats | None = None) -> None:
        options = (chat.system, chat.preset, chat.thinking)
        if self._id is None:
            self._id = history.new_chat(
                system=chat.system, preset=chat.preset, thinking=chat.thinking, model=model
            )
        elif options != self._options:
            history.set_options(self._id, *options)
        self._options = options
        message, before = chat.messages[-1], chat.messages[:-1]
        parent = self._row(before[-1]) if before else None
        row = history.add(self._id, message, parent=parent, stats=stats, model=model)
        self._rows.append((message, row))

    def _versions(self, history: History, chat: Chat) -> list[tuple[int, Message, bool]]:
        if self._id is None:
            return []
        mine = [row for message in chat.messages if (row := self._row(message)) is not None]
        saved = {found.id: found.message for found in history.all_messages(self._id)}
        for row in reversed(mine[-2:]):
            rows = history.siblings(row)
            if len(rows) > 1:
                return [(one, saved[one], one == row) for one in rows]
        return []

    def _try(self, work: Callable[[History], T]) -> T | None:
        if self._history is None:
            return None
        try:
            return work(self._history)
        except HistoryError as error:
            say(f"from here on this chat is not saved: {error.message}\nhint: {error.hint}")
            self._history.close()
            self._history = None
            return None


def find(number: int | None) -> int:
    """The number of the chat to go on with: this one if there is such a one, None: the last."""
    with _open() as history:
        return _info(history, number).id


def _info(history: History, number: int | None) -> ChatInfo:
    info = history.last() if number is None else history.chat(number)
    if info is None:
        raise UsageError("there is no chat to go on with", hint="`mimo chat` without -c starts one")
    return info


def _open() -> History:
    from mimo_local.history import History

    return History.open(Paths.default().history_file)


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _unsaved(chat: Chat, model: str) -> tuple[ChatInfo, list[Stored]]:
    """A chat that is in no file, in the history's terms."""
    from mimo_local.history import ChatInfo, Stored

    now = time.time()
    stored = [
        Stored(at + 1, at or None, message, now, {}, model)
        for at, message in enumerate(chat.messages)
    ]
    count = len(stored)
    title = next((m.content for m in chat.messages if m.role == "user"), "")
    info = ChatInfo(
        0, " ".join(title.split())[:60], now, now, chat.system, chat.preset, chat.thinking,
        model, count, 1,
    )  # fmt: skip
    return info, stored
