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

KEYS = (
    ("Enter", "send"),
    ("Ctrl+J, Shift+Enter", "new line"),
    ("Up, Down", "earlier prompts, from an empty prompt"),
    ("Esc, Ctrl+C", "stop the answer and keep it"),
    ("PageUp, PageDown", "scroll; Ctrl+End: back to the end"),
    ("Tab", "to transcript and thinking; completes a command"),
    ("Enter on `Thought`", "open or close it"),
    ("y or Ctrl+Y", "copy the last answer (outside the prompt)"),
    ("Ctrl+P", "palette: commands, themes"),
    ("F1", "this page"),
    ("Ctrl+Q", "quit"),
)


class HelpScreen(ModalScreen[None]):
    """Keys and commands."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q,enter", "dismiss", "Close", key_display="Esc"),
    ]

    def compose(self) -> ComposeResult:
        """Two tables in one scrolling box."""
        with VerticalScroll(id="help") as box:
            box.border_title = "Help"
            box.border_subtitle = "Esc closes"
            yield Static("Keys", classes="heading")
            yield Static(_table(KEYS))
            yield Static("Commands", classes="heading")
            rows = tuple((f"/{c.name} {c.argument}".rstrip(), c.help) for c in COMMANDS)
            yield Static(_table(rows))


def _table(rows: tuple[tuple[str, str], ...]) -> Content:
    width = max(len(left) for left, _ in rows)
    return Content("\n").join(
        Content.assemble((left.ljust(width), "bold"), ("  " + right, "dim")) for left, right in rows
    )
