"""The scrolling middle of the screen and the small things in it: what the user said, notes, errors.

Follows new text until the user scrolls up, and again once the user is back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from tui.messages import Problem
from tui.widgets.answer import Answer
from tui.widgets.figures import plain


class Transcript(VerticalScroll):
    """All turns of the chat, newest last."""

    def on_mount(self) -> None:
        """Stay at the end from the start."""
        self.anchor()

    @property
    def following(self) -> bool:
        """Whether the end is on screen and stays there."""
        return self.scroll_y >= self.max_scroll_y

    async def say(self, widget: Widget) -> None:
        """Add something at the end and go there."""
        await self.mount(widget)
        self.follow()

    async def note(self, text: str) -> None:
        """Add a remark of the tool."""
        await self.say(Note(text))

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.anchor()
        self.scroll_end(animate=False)


class UserMessage(Vertical):
    """The user's words, verbatim: neither Markdown nor markup is interpreted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        """Who, then the words."""
        yield Static("You", classes="who")
        yield Static(Content(plain(self.text)), classes="words")


@dataclass
class Turn:
    """The turn being answered, or the last one."""

    asked: UserMessage
    answer: Answer
    prompt_tokens: int = 0
    attempt: int = 0


class Note(Static):
    """Something the tool says, not the model."""

    def __init__(self, text: str | Content) -> None:
        super().__init__(Content(plain(text)) if isinstance(text, str) else text)


class ErrorBox(Vertical):
    """What went wrong and what to do next."""

    def __init__(self, title: str, problem: Problem) -> None:
        super().__init__()
        self.border_title = title
        self.problem = problem

    def compose(self) -> ComposeResult:
        """Problem, then the way out."""
        yield Static(Content(plain(self.problem.message)), classes="problem")
        yield Static(Content(f"→ {plain(self.problem.hint)}"), classes="hint")
