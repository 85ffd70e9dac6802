"""Saves the chat while it is held, and reads saved ones: all in one thread of its own.

A slow or locked disk never stops the screen, and a failing one never stops the chat: it is said
once (`KeepFailed`) and tried again with the next change. Knows the history and no widget; called by
the chat screen, which gets messages back.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from mimo_local.errors import HistoryError
from tui.conversation import Conversation, Node
from tui.messages import ChatRow, Found, KeepFailed, Kept, Problem, Titled

if TYPE_CHECKING:
    from mimo_local.history import ChatInfo, History, Stored

OpenHistory = Callable[[], "History"]
LISTED = 200
"""Chats or hits in the list at once: more are found by searching."""


@dataclass
class Opened(Message):
    """A saved chat; `message` is the one to go to, None: the last one."""

    info: ChatInfo
    messages: tuple[Stored, ...]
    """Of all branches, a parent before its children."""
    branch: tuple[int, ...]
    """Ids of the active branch."""
    message: int | None


class Keeper:
    """Does what it is asked one after another; without a history it does nothing."""

    def __init__(
        self,
        post: Callable[[Message], None],
        open_history: OpenHistory | None,
        *,
        saves: bool = True,
    ) -> None:
        """`saves`: whether this chat is kept; saved ones can be read without."""
        self._post, self._open_history, self._saves = post, open_history, saves
        self._history: History | None = None
        self._jobs: queue.Queue[tuple[Callable[[History], None], bool] | None] = queue.Queue()
        self._failing = False
        self._waiting: set[int] = set()
        """Keys of nodes with a save in the queue: an answer streams faster than a slow disk."""
        self._model = ""
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether there are saved chats."""
        return self._open_history is not None

    def start(self) -> None:
        """Begin working; the file is opened in the thread."""
        if self.on and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mimo-keeper", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 3.0) -> None:
        """Finish what is waiting and close the file."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    # ---- saving --------------------------------------------------------------------------------

    def save(self, chat: Conversation, node: Node, model: str = "") -> None:
        """Save a message as it is when its turn comes; what precedes it is saved before it."""
        if model:
            self._model = model
        if node.key not in self._waiting:
            self._waiting.add(node.key)
            self._do(lambda h: self._save(h, chat, node), saving=True)

    def choose(self, node: Node) -> None:
        """The branch through this message is the one to come back to."""

        def work(h: History) -> None:
            if node.saved is not None:
                h.choose(node.saved)

        self._do(work, saving=True)

    def replaces(self, new: Node, old: Node) -> None:
        """`old` was taken back and said again as `new`: one message, not two branches."""

        def work(_: History) -> None:
            new.saved, old.saved = old.saved, None

        self._do(work, saving=True)

    def set_options(self, chat: Conversation) -> None:
        """System prompt, preset and thinking, if the chat was saved already."""

        def work(h: History) -> None:
            if chat.saved is not None:
                h.set_options(chat.saved, chat.system, chat.preset, chat.thinking)

        self._do(work, saving=True)

    # ---- reading and changing ------------------------------------------------------------------

    def find(self, text: str = "") -> None:
        """`Found` with the chats changed last, or where the text was found."""
        self._do(lambda h: self._post(Found(text, _rows(h, text))))

    def open(self, chat: int, message: int | None = None) -> None:
        """`Opened` with all messages of a chat."""

        def work(h: History) -> None:
            everything = tuple(h.all_messages(chat))
            branch = tuple(stored.id for stored in h.messages(chat))
            self._post(Opened(h.chat(chat), everything, branch, message))

        self._do(work)

    def rename(self, chat: int, title: str) -> None:
        """Give it another title."""

        def work(h: History) -> None:
            h.rename(chat, title)
            self._post(Titled(chat, title))
            self._post(Kept("Renamed", chat))

        self._do(work)

    def remove(self, chat: int) -> None:
        """Delete it for good."""

        def work(h: History) -> None:
            h.remove(chat)
            self._post(Kept("Deleted", chat))

        self._do(work)

    def export(self, chat: int, path: Path, *, replace: bool = False) -> None:
        """Write it to a file: JSON with all branches if the name ends so, else Markdown."""

        def work(h: History) -> None:
            if path.suffix.lower() == ".json":
                text = json.dumps(h.export_json(chat), ensure_ascii=False, indent=2) + "\n"
            else:
                text = h.export_markdown(chat)
            try:
                with path.open("w" if replace else "x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError as error:
                raise HistoryError(f"{path} exists", hint="choose another name") from error
            except OSError as error:
                raise HistoryError(
                    f"{path} cannot be written: {error.strerror or error}",
                    hint="choose another folder",
                ) from error
            self._post(Kept(f"Exported to {path}"))

        self._do(work)

    def import_file(self, path: Path) -> None:
        """Take in chats from a JSON file."""

        def work(h: History) -> None:
            hint = "give a JSON file: an export of this tool, OpenAI messages, a ChatGPT export"
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise HistoryError(
                    f"{path} cannot be read: {error.strerror or error}", hint=hint
                ) from error
            except (ValueError, RecursionError) as error:
                raise HistoryError(f"{path} is no JSON: {error}", hint=hint) from error
            n = len(h.import_chats(data))
            self._post(Kept(f"Imported {n} chat" + ("" if n == 1 else "s")))

        self._do(work)

    # ---- the thread ----------------------------------------------------------------------------

    def _do(self, work: Callable[[History], None], *, saving: bool = False) -> None:
        if self.on and (self._saves or not saving):
            self._jobs.put((work, saving))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, saving = job
            try:
                if self._history is None:
                    assert self._open_history is not None
                    self._history = self._open_history()
                work(self._history)
                self._failing = self._failing and not saving
            except Exception as error:
                # Whatever breaks here must neither end the thread nor the chat.
                if not (saving and self._failing):
                    self._post(KeepFailed(Problem.of(error), saving))
                self._failing = self._failing or saving
        if self._history is not None:
            with suppress(HistoryError):
                self._history.close()

    def _save(self, history: History, chat: Conversation, node: Node) -> None:
        self._waiting.discard(node.key)
        fresh = chat.saved is None
        if chat.saved is None:
            chat.saved = history.new_chat(
                system=chat.system, preset=chat.preset, thinking=chat.thinking, model=self._model
            )
        self._write(history, chat, node)
        if fresh:
            chat.title = history.chat(chat.saved).title
            self._post(Titled(chat.saved, chat.title))

    def _write(self, history: History, chat: Conversation, node: Node) -> None:
        assert chat.saved is not None
        if node.saved is not None:
            history.update(node.saved, node.message, node.stats)
            return
        parent = node.parent
        if parent is not None and parent.parent is not None and parent.saved is None:
            self._write(history, chat, parent)  # its own save had failed
        model = self._model if node.role == "assistant" else ""
        node.saved = history.add(
            chat.saved,
            node.message,
            parent=parent.saved if parent is not None else None,
            stats=node.stats,
            model=model,
        )


def _rows(history: History, text: str) -> tuple[ChatRow, ...]:
    if not text.strip():
        found = history.chats(LISTED)
        return tuple(ChatRow(c.id, c.title, c.updated, c.n_messages) for c in found)
    hits = history.search(text, LISTED)
    # A title is made of the first question: where a message was found, its title says nothing new.
    inside = {h.chat.id for h in hits if h.message_id is not None}
    return tuple(
        ChatRow(h.chat.id, h.chat.title, h.chat.updated, h.chat.n_messages, h.snippet, h.message_id)
        for h in hits
        if h.message_id is not None or h.chat.id not in inside
    )
