"""Where experts come from while an answer runs: one line, there only if some lie on disk.

Shows what it is told; the chat screen tells it.
"""

from __future__ import annotations

from rich.cells import cell_len
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from mimo_local.events import ExpertFigures
from tui.widgets.figures import amount, tier_bar, tier_shares

BAR = 16
"""Cells of the bar."""


class TierMeters(Widget):
    """Hits per tier and bytes read per token on the left, memory of the tiers on the right."""

    figures: reactive[ExpertFigures | None] = reactive(None)
    per_token: reactive[float] = reactive(0.0)
    """Bytes from disk, of the running answer or the last one."""

    def on_mount(self) -> None:
        """Nothing to show yet."""
        self.display = False

    def show(self, figures: ExpertFigures | None, per_token: float = 0.0) -> None:
        """Show these; None, as for a model that lies in RAM whole, takes the line away."""
        self.figures, self.per_token, self.display = figures, per_token, figures is not None

    def render(self) -> Content:
        """One line, exactly as wide as the widget; first the bar gives way, then the words."""
        e, width = self.figures, self.content_size.width
        if e is None:
            return Content("")
        right = f"{amount(e.ram_bytes + e.vram_bytes, 0, 'bytes')} held"
        words = [tier_shares(e)]
        if self.per_token:
            words.append(f"{amount(round(self.per_token), 0, 'bytes')} a token")
        elif e.disk_bytes:
            words.append(f"{amount(e.disk_bytes, 0, 'bytes')} from disk")
        left = " · ".join(filter(None, words))
        bar = tier_bar(e, BAR)
        if bar and len(bar) + 2 + cell_len(left) + 2 + cell_len(right) <= width:
            left = f"{bar}  {left}"
        room = max(0, width - cell_len(right) - 2)
        return Content.assemble(
            Content(left).truncate(room, ellipsis=True, pad=True), "  ", (right, "dim")
        )
