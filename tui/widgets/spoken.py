"""What a question and an answer have in common: focus, keys, and the mark of their branch.

Copies by itself, anything that changes the chat it wishes for (`Wish`) and the chat screen does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.style import Style
from textual.widgets import Static

from tui.messages import Place, Wish
from tui.widgets.figures import count
from tui.widgets.markup import code_blocks

What = Literal["edit", "regenerate", "next", "previous", "up", "down"]


class MarkLine(Static):
    """The line of a message that holds the mark; its arrows are clicked here."""

    def action_wish(self, what: What) -> None:
        """The message's wish."""
        self.query_ancestor(Spoken).action_wish(what)


class Spoken(Vertical, can_focus=True):
    """One message of the transcript."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "Copy"),
        Binding("c", "copy_code", "Copy code"),
        Binding("e", "wish('edit')", "Edit"),
        Binding("r", "wish('regenerate')", "Answer again"),
        Binding("left,h", "wish('previous')", "Other branch", key_display="← →"),
        Binding("right,l", "wish('next')", "Next branch", show=False),
        Binding("j", "wish('down')", "Next message", show=False),
        Binding("k", "wish('up')", "Message before", show=False),
    ]

    def __init__(self, key: int, text: str = "") -> None:
        super().__init__()
        self.key = key
        """Of its node in the conversation."""
        self.text = text
        self.place = Place(1, 1)
        self._copied_code = -1

    def show_place(self, place: Place) -> None:
        """Say which branch this is."""
        if place != self.place:
            self.place = place
            self.refresh_bindings()
            self._show_mark()

    def _show_mark(self) -> None:
        """Show the mark where this kind of message has it."""

    def mark(self) -> Content:
        """`‹ 2/3 ›`, its arrows to be clicked; nothing where there is one branch only."""
        p = self.place
        if p.count < 2:
            return Content("")
        back, on = (Style.from_meta({"@click": f"wish('{what}')"}) for what in ("previous", "next"))
        return Content.assemble(("‹ ", back), f"{p.number}/{p.count}", (" ›", on))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Branch keys are offered where there are branches, code where there is code."""
        if action == "wish" and parameters[:1] in (("previous",), ("next",)):
            return self.place.count > 1
        if action == "copy_code":
            return "```" in self.text or "~~~" in self.text or "\n    " in self.text
        return True

    def action_wish(self, what: What) -> None:
        """Ask the screen for it."""
        self.post_message(Wish(self.key, what))

    def action_copy(self) -> None:
        """Copy the message as it was written."""
        self.app.copy_to_clipboard(self.text)
        self.notify(f"Copied: {count(len(self.text), 'character')}", markup=False)

    def action_copy_code(self) -> None:
        """Copy a code block; pressed again, the next one."""
        found = code_blocks(self.text)
        if not found:
            self.notify("There is no code in this message", markup=False)
            return
        self._copied_code = (self._copied_code + 1) % len(found)
        code = found[self._copied_code]
        self.app.copy_to_clipboard(code)
        which = f" {self._copied_code + 1} of {len(found)}" if len(found) > 1 else ""
        self.notify(f"Code block{which} copied: {count(code.count(chr(10)), 'line')}", markup=False)
