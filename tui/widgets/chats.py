"""The list of saved chats with its search field: beside the chat, or over it on a narrow screen.

Shows the rows it is told and posts what the user types and wants (`Searching`, `ListWish`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, Literal

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from tui.messages import ChatRow, ListWish, Searching
from tui.widgets.figures import count, plain

What = Literal["open", "new", "rename", "delete", "export", "import", "close"]


def ago(seconds: float) -> str:
    """`just now`, `5 min ago`, `3 h ago`, `4 days ago`, `2026-03-01`."""
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h ago"
    days = int(seconds // 86400)
    if days < 30:
        return f"{days} day{'' if days == 1 else 's'} ago"
    return time.strftime("%Y-%m-%d", time.localtime(time.time() - seconds))


def described(row: ChatRow, now: float, current: int | None, width: int) -> Content:
    """Two lines: the title, then when and how long or where the search found it."""
    title = Content(("● " if row.chat == current else "") + (plain(row.title) or "no title"))
    if row.snippet:
        parts = row.snippet.replace("\x03", "\x02").split("\x02")
        below = Content.assemble(
            *((plain(p), "bold underline" if i % 2 else "dim") for i, p in enumerate(parts))
        )
    else:
        words = f"{ago(now - row.changed)} · {count(row.messages, 'message')}"
        below = Content(words).stylize("dim")
    lines = (title.stylize("bold"), below)
    return Content("\n").join(line.truncate(width, ellipsis=True) for line in lines)


class ChatSearch(Input):
    """Where the search is typed; Down goes to the list."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "to_list", "To the list"),
        Binding("escape", "close", "Close"),
    ]

    def action_to_list(self) -> None:
        """Move on to what was found."""
        self.screen.query_one(ChatOptions).focus()

    def action_close(self) -> None:
        """Empty the field; from an empty one, close the list."""
        if self.value:
            self.value = ""
        else:
            self.post_message(ListWish("close"))


class ChatOptions(OptionList):
    """The rows, and the keys that do something with the one under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Open"),
        Binding("r", "wish('rename')", "Rename"),
        Binding("d,delete", "wish('delete')", "Delete", key_display="d"),
        Binding("x", "wish('export')", "Export"),
        Binding("i", "wish('import')", "Import"),
        Binding("n", "wish('new')", "New"),
        Binding("slash", "search", "Search", key_display="/"),
        Binding("escape", "wish('close')", "Close"),
    ]

    def __init__(self) -> None:
        super().__init__(markup=False)
        self.rows: tuple[ChatRow, ...] = ()

    @property
    def row(self) -> ChatRow | None:
        """The one under the cursor."""
        at = self.highlighted
        return self.rows[at] if at is not None and at < len(self.rows) else None

    def action_wish(self, what: What) -> None:
        """Ask the screen for it."""
        if self.row is not None or what in ("new", "import", "close"):
            self.post_message(ListWish(what, self.row))

    def action_search(self) -> None:
        """Back to the search field."""
        self.screen.query_one(ChatSearch).focus()

    def action_cursor_up(self) -> None:
        """From the first row to the search field."""
        if not self.highlighted:
            self.action_search()
        else:
            super().action_cursor_up()


class ChatList(Vertical):
    """Search field, rows, and a line that says what there is."""

    _current: int | None = None
    """The chat that is open."""

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield ChatSearch(placeholder="search all chats", id="chat-search")
        yield ChatOptions()
        yield Static("", id="chat-count", markup=False)

    def on_mount(self) -> None:
        """Closed at first."""
        self.border_title = "Chats"
        self.display = False

    @property
    def search(self) -> str:
        """What was typed."""
        return self.query_one(ChatSearch).value

    def show(self, rows: Sequence[ChatRow], text: str, current: int | None) -> None:
        """Show these rows, found for `text`; the cursor stays on its chat."""
        if text != self.search:
            return  # typed on meanwhile: another answer is on its way
        options = self.query_one(ChatOptions)
        before = options.row
        options.rows, self._current = tuple(rows), current
        self._fit()
        same = (n for n, r in enumerate(rows) if before is not None and r.chat == before.chat)
        options.highlighted = next(same, 0) if rows else None
        if text:
            words = f"{count(len(rows), 'place')} found" if rows else "nothing found"
        else:
            words = count(len(rows), "chat") if rows else "no chat is saved yet"
        self.query_one("#chat-count", Static).update(words)

    def on_resize(self) -> None:
        """Rows may come before the list has its width, and it changes with the window."""
        at = self.query_one(ChatOptions).highlighted
        self._fit()
        self.query_one(ChatOptions).highlighted = at

    def _fit(self) -> None:
        """Cut each row to the width there is."""
        options, now = self.query_one(ChatOptions), time.time()
        width = max(20, self.content_size.width - 3)  # padding and the scroll bar
        rows = (described(row, now, self._current, width) for row in options.rows)
        options.set_options([Option(row) for row in rows])

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(Searching(event.value))

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if (row := self.query_one(ChatOptions).row) is not None:
            self.post_message(ListWish("open", row))

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if (row := self.query_one(ChatOptions).row) is not None:
            self.post_message(ListWish("open", row))
