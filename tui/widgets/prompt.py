"""Where the user types: several lines, Enter sends, Up recalls, Tab completes commands and paths.

Posts `Submitted` and `Attach`; knows neither the chat nor whether an answer is running.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from tui.commands import Suggestion, suggest
from tui.mentions import mention_at, offers
from tui.messages import Attach, Submitted

# Most terminals send one byte for Shift+Enter and Enter; Ctrl+J and a closing \ always work.
NEWLINE_KEYS = ("shift+enter", "ctrl+j", "alt+enter")


class Prompt(TextArea):
    """A text area that grows to eight lines and remembers what was sent."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send"),
        Binding("ctrl+j", "newline", "New line", key_display="^j"),
        Binding("pageup", "screen.page(-1)", "Scroll up", show=False),
        Binding("pagedown", "screen.page(1)", "Scroll down", show=False),
        Binding("ctrl+end", "screen.follow", "To the end", show=False),
    ]

    def __init__(self, *, presets: Sequence[str] = (), id: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__(
            id=id,
            placeholder="Ask something. /help lists the commands",
            highlight_cursor_line=False,
        )
        self.presets = tuple(presets)
        self._sent: list[str] = []
        self._recalled: int | None = None
        self.picked = 0
        """Which suggestion Tab takes; Up and Down move it."""

    def action_submit(self) -> None:
        """Hand the text over; whoever takes it clears the prompt with `accept`."""
        if self.text.strip():
            self.post_message(Submitted(self.text))

    def action_newline(self) -> None:
        """Break the line at the cursor."""
        self.insert("\n", maintain_selection_offset=False)

    def edits(self, on: bool) -> None:
        """Say that an earlier question is being written anew, or no longer."""
        self.border_title = "Edit: Enter asks it as a new branch · Esc leaves it" if on else ""
        self.set_class(on, "editing")

    def accept(self) -> None:
        """The text was taken: remember it and start empty."""
        if not self._sent or self._sent[-1] != self.text:
            self._sent.append(self.text)
        self._recalled = None
        self.clear()

    def put(self, text: str) -> None:
        """Show `text` with the cursor behind it."""
        self.text = text
        self.move_cursor(self.document.end)

    def put_back(self, text: str) -> None:
        """Return a text that could not be used, before whatever was typed meanwhile."""
        self.put(text if not self.text.strip() else f"{text}\n{self.text}")

    async def _on_key(self, event: events.Key) -> None:
        if self._handle(event.key):
            event.stop()
            event.prevent_default()

    def _handle(self, key: str) -> bool:
        if key == "enter":
            row, column = self.cursor_location
            if self.text and column and self.document[row][column - 1] == "\\":
                self.action_delete_left()
                self.action_newline()
            else:
                self.action_submit()
            return True
        if key in NEWLINE_KEYS:
            self.action_newline()
            return True
        if key == "tab":
            return self._complete()
        if key in ("up", "down"):
            step = -1 if key == "up" else 1
            return self._pick(step) or self._recall(step)
        return False

    @property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """What the command or the `@path` under the cursor could become."""
        found = suggest(self.text, self.presets)
        if found or (mention := self._mention()) is None:
            return found
        return tuple(
            Suggestion(o.path, f"@{o.path}", "folder" if o.folder else "attach")
            for o in offers(mention[1])
        )

    def _pick(self, step: int) -> bool:
        """Another suggestion; False where there is no other."""
        n = len(self.suggestions)
        if n > 1:
            self.picked = (self.picked + step) % n
            self.post_message(self.SelectionChanged(self.selection, self))
        return n > 1

    def _mention(self) -> tuple[int, str] | None:
        """Where in the cursor's line an `@` stands, and what follows it."""
        row, column = self.cursor_location
        return mention_at(self.document[row], column)

    def _complete(self) -> bool:
        found, mention = self.suggestions, self._mention()
        if not found:
            return False
        taken = found[min(self.picked, len(found) - 1)]
        if mention is None:
            self.put(taken.insert)
            return True
        row, column = self.cursor_location
        path = taken.insert
        is_file = not path.endswith("/")
        new = Path(path.replace("\\ ", " ")).name + " " if is_file else f"@{path}"
        self.replace(new, (row, mention[0]), (row, column), maintain_selection_offset=False)
        if is_file:
            self.post_message(Attach(Path(path.replace("\\ ", " "))))
        return True

    def _recall(self, step: int) -> bool:
        """Walk through the sent texts, only from an empty prompt or an unchanged recalled text."""
        at = self._recalled
        if self.text and (at is None or self.text != self._sent[at]):
            return False
        if self.text and self.cursor_location[0] != (
            0 if step < 0 else self.document.line_count - 1
        ):
            return False
        target = (len(self._sent) if at is None or not self.text else at) + step
        if target < 0 or target > len(self._sent) or not self._sent:
            return bool(self.text) and target < 0
        self._recalled = target if target < len(self._sent) else None
        self.put(self._sent[target] if target < len(self._sent) else "")
        return True
