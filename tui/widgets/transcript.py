"""The scrolling middle of the screen and the small things in it: what the user said, notes, errors.

Follows new text until the user scrolls up, and again once the user is back at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from tui.messages import Problem, Wish
from tui.widgets.figures import count, plain
from tui.widgets.spoken import MarkLine, Spoken


class Transcript(VerticalScroll):
    """All turns of the shown branch, newest last."""

    def on_mount(self) -> None:
        """Stay at the end from the start."""
        self.anchor()

    @property
    def following(self) -> bool:
        """Whether the end is on screen and stays there."""
        return self.scroll_y >= self.max_scroll_y

    @property
    def spoken(self) -> list[Spoken]:
        """The messages, first one first."""
        return [child for child in self.children if isinstance(child, Spoken)]

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

    async def clear(self) -> None:
        """Nothing was said."""
        await self.remove_children("Spoken, Note, ErrorBox, Earlier")

    async def keep(self, n: int) -> None:
        """Take away every message after the first `n`, and what was said below them."""
        spoken = self.spoken
        if n < len(spoken):
            at = self.children.index(spoken[n])
            await self.remove_children(self.children[at:])

    def focus_by(self, step: int, origin: Spoken | None = None) -> bool:
        """Focus the next or previous message; False at an end. Without an origin: the last one."""
        spoken = self.spoken
        if not spoken:
            return False
        at = spoken.index(origin) + step if origin in spoken else len(spoken) - 1
        if not 0 <= at < len(spoken):
            return False
        # At once: `focus()` waits for a turn of the loop, and the next key may be here before it.
        self.screen.set_focus(spoken[at])
        return True


class UserMessage(Spoken):
    """The user's words, verbatim: neither Markdown nor markup is interpreted."""

    def __init__(self, key: int, text: str, files: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(key, text)
        self._files = tuple(files)
        """Name and characters of each document that came with it."""
        self._who = MarkLine("You", classes="who", markup=False)

    def compose(self) -> ComposeResult:
        """Who, the documents, then the words."""
        yield self._who
        for name, characters in self._files:
            line = f"▤ {plain(name)} · {count(characters, 'character')}"
            yield Static(Content(line), classes="file")
        yield Static(Content(plain(self.text)), classes="words")

    def on_mount(self) -> None:
        """Say which branch this is."""
        self._show_mark()

    def _show_mark(self) -> None:
        mark = self.mark()
        self._who.update(Content.assemble("You", "  " if mark else "", mark))


class Earlier(Static, can_focus=True):
    """Above the first message of a long chat: there are more."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "more", "Show them")]

    def __init__(self, hidden: int) -> None:
        super().__init__(f"{count(hidden, 'earlier message')} · Enter shows more", markup=False)

    def on_click(self) -> None:
        """The same as Enter."""
        self.action_more()

    def action_more(self) -> None:
        """Ask for them."""
        self.post_message(Wish(0, "earlier"))


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
