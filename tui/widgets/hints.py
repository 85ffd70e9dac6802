"""The lines above the prompt that say what an unfinished slash command could become."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

from tui.commands import Suggestion


class CommandHints(Static):
    """Shown only while there is something to suggest; Tab in the prompt takes the marked one."""

    def show(self, suggestions: Sequence[Suggestion], picked: int = 0) -> None:
        """One line per suggestion, a sign at the one Tab takes; none hides the widget."""
        self.display = bool(suggestions)
        if not suggestions:
            return
        width = max(len(s.label) for s in suggestions)
        lines = [
            Content.assemble(
                ("⇥ " if i == min(picked, len(suggestions) - 1) else "  ", "dim"),
                (s.label.ljust(width), "bold"),
                ("  " + s.help, "dim"),
            )
            for i, s in enumerate(suggestions)
        ]
        self.update(Content("\n").join(lines))
