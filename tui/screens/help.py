"""F1: every key and every command on one page. Closes with Esc, F1 or q."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.commands import COMMANDS

Rows = tuple[tuple[str, str], ...]

KEYS: tuple[tuple[str, Rows], ...] = (
    (
        "Prompt",
        (
            ("Enter", "send"),
            ("Ctrl+J, Shift+Enter", "new line; also a \\ before Enter"),
            ("Up, Down", "earlier prompts, from an empty prompt"),
            ("@path, Ctrl+O", "attach a document; Tab completes"),
            ("/command", "Tab completes"),
            ("Esc, Ctrl+C", "stop the answer and keep it"),
        ),
    ),
    (
        "Anywhere",
        (
            ("Alt+Up, Alt+Down", "to the messages and back; also Tab"),
            ("PageUp, PageDown", "scroll; Ctrl+End: back to the end"),
            ("y or Ctrl+Y", "copy the last answer (outside the prompt)"),
            ("F2", "chats: search, open, rename, export"),
            ("Ctrl+N", "new chat"),
            ("F4", "preset, thinking, system prompt of this chat"),
            ("Ctrl+P", "palette: commands, themes"),
            ("F1", "this page"),
            ("Ctrl+Q", "quit"),
        ),
    ),
    (
        "On a message",
        (
            ("j, k", "next message, message before"),
            ("y", "copy it"),
            ("c", "copy its code; again: the next block"),
            ("e", "edit the question and ask it as a branch"),
            ("r", "answer again, the old answer stays"),
            ("Left, Right or h, l", "other branch: ‹ 2/3 ›"),
            ("Enter", "open or close what was thought"),
            ("Delete, x", "on a document above the prompt: take it off"),
        ),
    ),
    (
        "In the list of chats",
        (
            ("Enter", "open"),
            ("/", "search"),
            ("r, d, x", "rename, delete (asks), export"),
            ("n, i", "new chat, import a file"),
            ("Esc", "close"),
        ),
    ),
)


class HelpScreen(ModalScreen[None]):
    """Keys and commands."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q,enter", "dismiss", "Close", key_display="Esc"),
    ]

    def compose(self) -> ComposeResult:
        """Tables in one scrolling box."""
        commands = tuple((f"/{c.name} {c.argument}".rstrip(), c.help) for c in COMMANDS)
        width = max(len(left) for _, rows in KEYS for left, _ in rows)
        with VerticalScroll(id="help") as box:
            box.border_title = "Help"
            box.border_subtitle = "Esc closes"
            for title, rows in (*KEYS, ("Commands", commands)):
                yield Static(title, classes="heading")
                yield Static(_table(rows, width))


def _table(rows: Rows, width: int) -> Content:
    return Content("\n").join(
        Content.assemble((left.ljust(width), "bold"), ("  " + right, "dim")) for left, right in rows
    )
