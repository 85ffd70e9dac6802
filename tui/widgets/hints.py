"""The lines above the prompt that say what an unfinished slash command could become."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

from tui.commands import Suggestion


class CommandHints(Static):
    """Shown only while there is something to suggest; Tab in the prompt takes the first."""

    def show(self, suggestions: Sequence[Suggestion]) -> None:
        """One line per suggestion; none hides the widget."""
        self.display = bool(suggestions)
        if not suggestions:
            return
        width = max(len(s.label) for s in suggestions)
        lines = [
            Content.assemble(
                ("⇥ " if i == 0 else "  ", "dim"),
                (s.label.ljust(width), "bold"),
                ("  " + s.help, "dim"),
            )
            for i, s in enumerate(suggestions)
        ]
        self.update(Content("\n").join(lines))
