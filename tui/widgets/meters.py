"""One line of meters: memory of this process, the machine and its GPU, drafts, disk.

Shows what it is told; the least important figures give way on a narrow screen, it never wraps.
"""

from __future__ import annotations

from rich.cells import cell_len
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from mimo_local.events import DraftFigures
from tui.messages import Machine
from tui.widgets.figures import amount, percent


def meter_parts(machine: Machine | None, drafts: DraftFigures | None, disk: float) -> list[str]:
    """The figures there are, the most important first."""
    parts = []
    if machine is not None and machine.total:
        parts.append(f"mimo {amount(machine.process, 0, 'bytes')}")
        parts.append(f"RAM {amount(machine.used, machine.total, 'bytes')}")
        if machine.vram_total:
            parts.append(f"VRAM {amount(machine.vram_used, machine.vram_total, 'bytes')}")
    if disk:
        parts.append(f"disk {amount(round(disk), 0, 'bytes')}/s")
    if drafts is not None and drafts.drafted:
        parts.append(f"drafts {percent(sum(drafts.accepted), sum(drafts.judged))}% right")
    return parts


class Meters(Widget):
    """There as soon as there is a figure."""

    machine: reactive[Machine | None] = reactive(None)
    drafts: reactive[DraftFigures | None] = reactive(None)
    """Of the running answer, else of the last one."""
    disk: reactive[float] = reactive(0.0)
    """Bytes a second of experts read while an answer runs."""

    def on_mount(self) -> None:
        """Nothing to show yet."""
        self.display = False

    def watch_machine(self, machine: Machine | None) -> None:
        """The line is there once there is something in it."""
        self.display = machine is not None and machine.total > 0

    def render(self) -> Content:
        """As many figures as fit."""
        text = ""
        for part in meter_parts(self.machine, self.drafts, self.disk):
            longer = f"{text} · {part}" if text else part
            if cell_len(longer) > self.content_size.width:
                break
            text = longer
        return Content(text)
