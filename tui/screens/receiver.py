"""What reaches the chat screen from bridge, keeper and widgets, handed to whoever acts on it.

The part of the chat screen that only passes on: base class of `ChatScreen`, which makes what is
declared here and adds the model, the prompt and the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from textual import on
from textual.screen import Screen
from textual.widget import Widget

from tui.keeper import Opened
from tui.messages import (
    AnswerDelta,
    AnswerDone,
    AnswerFailed,
    Attach,
    Attached,
    AttachFailed,
    Detached,
    Drafts,
    Found,
    KeepFailed,
    Kept,
    ListWish,
    MachineNow,
    Noted,
    Queued,
    Reading,
    Searching,
    Tiers,
    Titled,
    Wish,
)
from tui.widgets.figures import reading_line
from tui.widgets.meters import Meters
from tui.widgets.prompt import Prompt
from tui.widgets.spoken import Spoken
from tui.widgets.status import StatusLine
from tui.widgets.tiers import TierMeters
from tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from tui.keeper import Keeper
    from tui.screens.files import Files
    from tui.screens.library import Library
    from tui.screens.turns import Turns

State = Literal["loading", "idle", "answering", "failed"]


class Receiver(Screen[None]):
    """Receives messages."""

    state: State
    turns: Turns
    library: Library
    files: Files
    keeper: Keeper
    send_when_ready: bool

    @property
    def prompt(self) -> Prompt:
        """Where the user types."""
        return self.query_one(Prompt)

    def busy(self, wish: str) -> bool:
        """Whether an answer is running, said if so."""
        if self.state == "answering":
            self.notify(f"Stop the answer first (Esc) to {wish}", markup=False)
        return self.state == "answering"

    def say(self, text: str) -> None:
        """In the status line."""
        self.query_one(StatusLine).activity = text

    def used(self, tokens: int) -> None:
        """Of the context."""
        self.query_one(StatusLine).used = tokens

    def send_if_ready(self) -> None:
        """Send what was to be sent as soon as it can be."""
        if self.send_when_ready and self.state == "idle" and not self.files.reading:
            self.send_when_ready = False
            self.prompt.action_submit()

    def focus_message(self, step: int) -> None:
        """Focus the message before or after; past the last one, the prompt."""
        at = self.focused
        while at is not None and not isinstance(at, Spoken):
            at = at.parent if isinstance(at.parent, Widget) else None
        if at is None and step > 0:
            return
        transcript = self.query_one(Transcript)
        if not transcript.focus_by(step, at) and step > 0:
            self.set_focus(self.prompt)
            transcript.follow()

    # ---- messages of the transcript ------------------------------------------------------------

    @on(Wish)
    async def _wish(self, wish: Wish) -> None:
        if wish.what == "earlier":
            await self.turns.earlier()
            return
        node = self.turns.chat.node(wish.key)
        if wish.what in ("up", "down"):
            self.focus_message(-1 if wish.what == "up" else 1)
        elif node is not None and not self.busy("change the chat"):
            if wish.what == "edit":
                self.turns.edit(node)
            elif self.state == "failed" or self.state == "loading":
                self.notify("There is no model yet", markup=False)
            elif wish.what == "regenerate":
                await self.turns.regenerate(node)
            else:
                await self.turns.step(node, 1 if wish.what == "next" else -1)

    # ---- documents -----------------------------------------------------------------------------

    @on(Attach)
    def _attach_file(self, message: Attach) -> None:
        self.files.add(message.path)

    @on(Attached)
    def _attached(self, message: Attached) -> None:
        self.files.attached(message)
        self.send_if_ready()

    @on(AttachFailed)
    def _attach_failed(self, message: AttachFailed) -> None:
        self.send_when_ready = False
        self.files.failed(message)

    @on(Detached)
    def _detached(self, message: Detached) -> None:
        self.files.remove(message.ticket)
        self.prompt.focus()

    # ---- one answer ----------------------------------------------------------------------------

    @on(Queued)
    def _queued(self) -> None:
        self.say("waiting: the engine is busy with other requests · Esc gives up")

    @on(Reading)
    def _reading(self, message: Reading) -> None:
        if self.turns.running is not None:
            self.turns.running.prompt_tokens = message.prefill.total
            self.say(reading_line(message.prefill))
            self.used(message.prefill.done)

    @on(AnswerDelta)
    async def _delta(self, message: AnswerDelta) -> None:
        await self.turns.delta(message)

    @on(AnswerDone)
    async def _done(self, message: AnswerDone) -> None:
        stats, meters = message.stats, self.query_one(Meters)
        self.query_one(TierMeters).show(stats.experts, stats.disk_bytes_per_token)
        meters.disk, meters.drafts = 0.0, stats.draft
        await self.turns.done(message)

    @on(AnswerFailed)
    async def _failed(self, message: AnswerFailed) -> None:
        self.query_one(Meters).disk = 0.0
        await self.turns.failed(message.problem)

    @on(Noted)
    async def _noted(self, message: Noted) -> None:
        await self.query_one(Transcript).note(message.text)

    @on(Drafts)
    def _drafts(self, message: Drafts) -> None:
        self.query_one(Meters).drafts = message.figures

    @on(Tiers)
    def _tiers(self, message: Tiers) -> None:
        self.query_one(TierMeters).show(message.experts, message.disk_bytes_per_token)
        self.query_one(Meters).disk = message.disk_bytes_per_s

    @on(MachineNow)
    def _machine(self, message: MachineNow) -> None:
        self.query_one(Meters).machine = message.machine

    # ---- saved chats ---------------------------------------------------------------------------

    @on(Searching)
    def _searching(self, message: Searching) -> None:
        self.keeper.find(message.text)

    @on(ListWish)
    async def _list_wish(self, wish: ListWish) -> None:
        await self.library.wish(wish)

    @on(Found)
    def _found(self, message: Found) -> None:
        self.library.found(message)

    @on(Opened)
    async def _opened(self, message: Opened) -> None:
        await self.library.opened(message)

    @on(Kept)
    async def _kept(self, message: Kept) -> None:
        await self.library.kept(message)

    @on(Titled)
    def _titled(self, message: Titled) -> None:
        self.library.titled(message)

    @on(KeepFailed)
    def _keep_failed(self, message: KeepFailed) -> None:
        self.library.failed(message)
