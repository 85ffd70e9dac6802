"""One answer: thinking (folded away), streaming Markdown, a line of figures when it is over.

Fed by the chat screen with `add`, ended with `finish`. Knows nothing of where text comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Collapsible, Static

from tui.messages import Pace, TextPiece
from tui.widgets.figures import count, duration, plain
from tui.widgets.flow import Flow
from tui.widgets.spoken import MarkLine, Spoken

# A frozen block is never laid out again: without the cut each update would wrap all the thinking.
THINKING_BLOCK_CHARS = 2000


class Thinking(Collapsible):
    """What the model thought, closed until the user opens it; streams dim while open."""

    def __init__(self) -> None:
        self._body = Vertical(classes="thinking-body")
        super().__init__(self._body, title="Thinking…", collapsed=True)
        self._tail: Static | None = None
        self._tail_text = ""
        self._waiting = ""

    def add(self, text: str) -> None:
        """More thinking; laid out only while somebody looks."""
        self._waiting += text
        if not self.collapsed:
            self._show()

    def label(self, pace: Pace, *, done: bool) -> None:
        """Put time and tokens in the title, as far as they are known."""
        figures = f"{duration(pace.thinking_s)} · {count(pace.thinking_tokens, 'token')}"
        title = f"Thought for {figures}" if done else f"Thinking… {figures}"
        if self.title != title:
            self.title = title

    @on(Collapsible.Expanded)
    def _opened(self) -> None:
        self._show()

    def _show(self) -> None:
        self._tail_text += plain(self._waiting)
        self._waiting = ""
        while len(self._tail_text) > THINKING_BLOCK_CHARS:
            cut = self._tail_text.rfind("\n", 0, THINKING_BLOCK_CHARS)
            if cut <= 0:
                break
            self._write(self._tail_text[:cut])
            self._tail, self._tail_text = None, self._tail_text[cut + 1 :]
        self._write(self._tail_text)

    def _write(self, text: str) -> None:
        if self._tail is None:
            self._tail = Static(Content(text.strip("\n")))
            self._body.mount(self._tail)
        else:
            self._tail.update(Content(text.strip("\n")))


class Answer(Spoken):
    """The model's side of one turn; with a `text` it is complete."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "toggle_thinking", "Thinking"),
    ]

    def __init__(
        self, key: int, text: str = "", reasoning: str = "", foot: str = "", thought: str = ""
    ) -> None:
        super().__init__(key, text)
        self._thought_title = thought
        self.reasoning = reasoning
        self._flow = Flow(text)
        self._thinking: Thinking | None = None
        self._thought = bool(text)
        self._foot_text = foot
        self._foot = MarkLine("", classes="foot", markup=False)

    def compose(self) -> ComposeResult:
        """Thinking above the text, figures below it."""
        if self.reasoning:
            self._thinking = Thinking()
            self._thinking.add(self.reasoning)
            self._thinking.title = self._thought_title or "Thought"
            yield self._thinking
        yield self._flow
        yield self._foot

    def on_mount(self) -> None:
        """The mark of the branch is there from the start, figures at the end."""
        self._show_mark()

    @property
    def thought_title(self) -> str:
        """What the title of the thinking says."""
        return self._thinking.title if self._thinking is not None else ""

    async def add(self, pieces: Iterable[TextPiece], pace: Pace) -> None:
        """Show more text."""
        for piece in pieces:
            if piece.kind == "thinking":
                self.reasoning += piece.text
                if self._thinking is None:
                    self._thinking = Thinking()
                    await self.mount(self._thinking, before=self._flow)
                self._thinking.add(piece.text)
            else:
                self._thought = self._thinking is not None
                self.text += piece.text
                await self._flow.add(piece.text)
        if self._thinking is not None:
            self._thinking.label(pace, done=self._thought)

    async def finish(self, foot: str, pace: Pace) -> None:
        """No more text comes: add the line of figures."""
        await self._flow.finish()
        if self._thinking is not None:
            self._thinking.label(pace, done=True)
        self._foot_text = foot
        self._show_mark()
        self.refresh_bindings()

    def _show_mark(self) -> None:
        parts = [part for part in (self.mark(), Content(self._foot_text)) if part]
        self._foot.update(Content(" · ").join(parts))
        self._foot.display = bool(parts)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Enter opens the thinking where there is any."""
        if action == "toggle_thinking":
            return self._thinking is not None
        return super().check_action(action, parameters)

    def action_toggle_thinking(self) -> None:
        """Open or close what was thought."""
        if self._thinking is not None:
            self._thinking.collapsed = not self._thinking.collapsed
