"""The documents of the prompt being written: being read, counted, shown as chips, taken along.

Reads nothing itself: the bridge does, in a thread. Called by the chat screen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_local.chat import Attachment
from tui.messages import Attached, AttachFailed, FileInfo
from tui.widgets.chips import Chips
from tui.widgets.figures import plain

if TYPE_CHECKING:
    from tui.screens.chat import ChatScreen


class Files:
    """What will be sent along with the next question."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._tickets = itertools.count(1)
        self._files: dict[int, FileInfo] = {}
        self._paths: dict[int, Path] = {}

    @property
    def reading(self) -> bool:
        """Whether a document is still being read."""
        return any(f.text is None for f in self._files.values())

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """Those that were read, in the order they were added."""
        return tuple(Attachment(f.name, f.text) for f in self._files.values() if f.text is not None)

    def add(self, path: Path) -> None:
        """Read a document; one that is attached already is not read twice."""
        path = path.expanduser().absolute()
        bridge = self._screen.bridge
        if bridge is None or path in self._paths.values():
            return
        ticket = next(self._tickets)
        self._paths[ticket] = path
        self._files[ticket] = FileInfo(ticket, path.name)
        self._show()
        bridge.attach(ticket, path)

    def attached(self, message: Attached) -> None:
        """It was read, or counted."""
        ticket = message.file.ticket
        before = self._files.get(ticket)
        if before is None:
            return  # taken off meanwhile
        self._files[ticket] = message.file
        if message.file.note and before.text is None:
            title = f"{plain(message.file.name)} has gaps"
            self._screen.notify(
                plain(message.file.note), title=title, severity="warning", markup=False
            )
        self._show()

    def failed(self, message: AttachFailed) -> None:
        """It could not be read; the prompt stays as it is."""
        self.remove(message.ticket)
        problem = message.problem
        self._screen.notify(
            f"{plain(problem.message)}\n→ {plain(problem.hint)}",
            title="Not attached",
            severity="error",
            timeout=10,
            markup=False,
        )

    def remove(self, ticket: int) -> None:
        """Do not send it."""
        self._files.pop(ticket, None)
        self._paths.pop(ticket, None)
        self._show()

    def take(self) -> tuple[Attachment, ...]:
        """All of them, to be sent now."""
        taken = self.attachments
        self.replace(())
        return taken

    def replace(self, attachments: Iterable[Attachment]) -> None:
        """Have these instead, as when an earlier question is edited."""
        self._files.clear()
        self._paths.clear()
        self.put_back(attachments)

    def put_back(self, attachments: Iterable[Attachment]) -> None:
        """Have these again: their question could not be asked."""
        for attachment in attachments:
            ticket = next(self._tickets)
            self._files[ticket] = FileInfo(ticket, attachment.name, None, attachment.text)
        self.count()
        self._show()

    def count(self) -> None:
        """Have the tokens counted of those that were not yet: there was no model."""
        if self._screen.bridge is not None:
            for file in self._files.values():
                if file.text is not None and file.tokens is None:
                    self._screen.bridge.count(file)

    def _show(self) -> None:
        screen = self._screen
        chips = screen.query_one(Chips)
        chips.show(tuple(self._files.values()), screen.context_used, screen.context_limit)
