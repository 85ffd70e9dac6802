"""One line at the top (which model) and one above the prompt (what is going on, context used).

Both show what they are told; the chat screen tells them.
"""

from __future__ import annotations

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Static

from tui.messages import ModelInfo
from tui.widgets.figures import percent, plain

GAUGE = 6
"""Cells of the context gauge; one is full with the first token."""


class TitleBar(Horizontal):
    """`mimo  name` on the left, the kernel in use on the right."""

    def compose(self) -> ComposeResult:
        """Only the brand until a model is there."""
        yield Static("mimo", id="brand")
        yield Static("", id="model", markup=False)
        yield Static("", id="title", markup=False)
        yield Static("", id="kernel", markup=False)

    def show(self, model: ModelInfo) -> None:
        """Name the model and the kernel."""
        self.query_one("#model", Static).update(plain(model.name))
        self.query_one("#kernel", Static).update(plain(model.kernel))

    def title(self, title: str) -> None:
        """Name the chat."""
        self.query_one("#title", Static).update(plain(title))


class StatusLine(Widget):
    """Activity on the left, context used on the right; the left side gives way."""

    activity = reactive("")
    more_below = reactive(False)
    used = reactive(0)
    limit = reactive(0)

    def render(self) -> Content:
        """One line, exactly as wide as the widget."""
        width = self.content_size.width
        left = self.activity
        if self.more_below:
            left = f"↓ more below: Ctrl+End · {left}"
        right = self._usage(short=False)
        if cell_len(left) + 2 + cell_len(right) > width:
            right = self._usage(short=True)
        room = max(0, width - len(right) - 2)
        return Content.assemble(
            Content(left).truncate(room, ellipsis=True, pad=True), "  ", (right, "dim")
        )

    def _usage(self, *, short: bool) -> str:
        if not self.limit:
            return ""
        share = f"{percent(self.used, self.limit)}%"
        return share if short else f"context {self.used:,} / {self.limit:,} {self._gauge()} {share}"

    def _gauge(self) -> str:
        full = min(GAUGE, -(-GAUGE * self.used // self.limit))
        return "▰" * full + "▱" * (GAUGE - full)
