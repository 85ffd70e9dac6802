"""The documents attached to the prompt, one chip each, and what they cost of the context.

Shows what it is told; a chip is taken off with Delete, Backspace, x or a click on its cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.style import Style
from textual.widgets import Static

from tui.messages import Detached, FileInfo
from tui.widgets.figures import count, plain

NAME = 28
"""Cells of a file's name: two chips fit in 80 columns."""


class Chip(Static, can_focus=True):
    """One document."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete,backspace,x", "detach", "Take off", key_display="Del"),
    ]

    def __init__(self, file: FileInfo) -> None:
        self.file = file
        tokens = "" if file.tokens is None else f" {count(file.tokens, 'token')}"
        if file.text is None:
            tokens = " reading…"
        name = Content(plain(file.name)).truncate(NAME, ellipsis=True).stylize("bold")
        cross = Style.from_meta({"@click": "detach"})
        super().__init__(Content.assemble("▤ ", name, (tokens, "dim"), (" ✕", cross)))

    def action_detach(self) -> None:
        """Take it off."""
        self.post_message(Detached(self.file.ticket))


class Chips(Vertical):
    """All documents in one row, and a warning below it if they are too much."""

    def compose(self) -> ComposeResult:
        """Empty at first."""
        yield Horizontal(id="chips")
        yield Static("", id="room", markup=False)

    def on_mount(self) -> None:
        """Nothing is attached."""
        self.display = False

    def show(self, files: Sequence[FileInfo], used: int, limit: int) -> None:
        """Show these; `used` and `limit` are tokens of the context."""
        self.display = bool(files)
        row = self.query_one("#chips", Horizontal)
        with self.app.batch_update():
            focused = isinstance(self.screen.focused, Chip)
            row.remove_children()
            row.mount(*map(Chip, files))
        if focused and not files:
            self.screen.focus_next("Prompt")
        words = room(files, used, limit)
        note = self.query_one("#room", Static)
        note.update(words)
        note.display = bool(words)
        note.set_class("too long" in words, "too-long")


def room(files: Sequence[FileInfo], used: int, limit: int) -> str:
    """What the documents leave of the context; nothing before that is known."""
    tokens = [f.tokens for f in files]
    if not files or not limit or None in tokens:
        return ""
    left = limit - used - sum(t for t in tokens if t is not None)
    total = sum(t for t in tokens if t is not None)
    if left < 0:
        return f"too long for the context by {count(-left, 'token')}: take a document off"
    if len(files) > 1:
        return f"{count(total, 'token')} together, {left:,} left in the context"
    return f"{left:,} tokens left in the context"
