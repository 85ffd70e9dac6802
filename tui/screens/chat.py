"""The chat: list, transcript, meters, prompt. Hands messages and keys to those who act on them.

What is said and answered is in `Turns`, saved chats in `Library`, documents in `Files`, slash
commands in `Commands`; everything that computes runs behind the bridge. States: loading -> idle <->
answering, or failed when there is no engine. Pushed by the app.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message as TextualMessage
from textual.widgets import Footer, TextArea

from mimo_local.chat import PRESETS, Chat
from tui.bridge import Bridge, ChatDefaults, EngineFactory
from tui.commands import BadCommand, Command, parse, unescape
from tui.conversation import Conversation
from tui.keeper import Keeper, OpenHistory
from tui.mentions import files_in
from tui.messages import (
    LoadFailed,
    Loading,
    ModelInfo,
    Ready,
    Submitted,
)
from tui.screens.actions import Commands
from tui.screens.dialogs import AttachScreen
from tui.screens.files import Files
from tui.screens.help import HelpScreen
from tui.screens.library import Library
from tui.screens.receiver import Receiver, State
from tui.screens.turns import Turns
from tui.widgets.chats import ChatList
from tui.widgets.chips import Chips
from tui.widgets.hints import CommandHints
from tui.widgets.loading import LoadPanel
from tui.widgets.meters import Meters
from tui.widgets.prompt import Prompt
from tui.widgets.spoken import Spoken
from tui.widgets.status import StatusLine, TitleBar
from tui.widgets.tiers import TierMeters
from tui.widgets.transcript import ErrorBox, Transcript


class ChatScreen(Receiver):
    """One conversation with one model, and the way to all others."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - Textual's attribute
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("y,ctrl+y", "copy_answer", "Copy answer", key_display="y"),
        Binding("f1", "help", "Help"),
        Binding("f2", "chats", "Chats"),
        Binding("ctrl+o", "attach", "Attach"),
        Binding("f4", "settings", "Settings"),
        Binding("ctrl+n", "new", "New chat", show=False),
        Binding("alt+up", "message(-1)", "Message before", show=False, priority=True),
        Binding("alt+down", "message(1)", "Next message", show=False, priority=True),
        Binding("pageup", "page(-1)", "Scroll up", show=False),
        Binding("pagedown", "page(1)", "Scroll down", show=False),
        Binding("ctrl+end", "follow", "To the end", show=False),
    ]

    def __init__(
        self,
        factory: EngineFactory,
        defaults: ChatDefaults,
        open_history: OpenHistory | None = None,
        save: bool = True,
    ) -> None:
        super().__init__()
        self._factory, self._defaults = factory, defaults
        self.state: State = "loading"
        self.model: ModelInfo | None = None
        self.exit_code = 0
        self.about = ""
        """Said under the model's description; set by `run` before the engine is ready."""
        self.bridge: Bridge | None = None
        self.keeper = Keeper(self._post, open_history, saves=save)
        self.turns = Turns(self, self._new_chat())
        self.library, self.files, self.commands = Library(self), Files(self), Commands(self)
        self.send_when_ready = False
        self._ui_loop: asyncio.AbstractEventLoop | None = None
        self._in_context = contextvars.copy_context()

    def compose(self) -> ComposeResult:
        """The list beside the chat, top to bottom."""
        yield TitleBar()
        with Horizontal(id="middle"):
            yield ChatList()
            with Vertical(id="main"):
                with Transcript(id="transcript"):
                    yield LoadPanel()
                yield CommandHints()
                yield Chips()
                yield TierMeters()
                yield Meters()
                yield StatusLine()
                yield Prompt(presets=tuple(PRESETS), id="prompt")
        yield Footer(show_command_palette=True)

    def on_mount(self) -> None:
        """Connect bridge and keeper to this screen's message queue and start the load."""
        self.query_one(CommandHints).display = False
        self.show_chat()
        self.prompt.focus()
        self.say("loading · you can type already")
        self._ui_loop, self._in_context = asyncio.get_running_loop(), contextvars.copy_context()
        self.bridge = Bridge(self._post, self._later, self._factory, self._defaults)
        self.bridge.load()
        self.bridge.watch()
        self.keeper.start()
        if self._defaults.chat_id is not None:
            self.keeper.open(self._defaults.chat_id)
        self.watch(self.transcript, "scroll_y", self._show_position, init=False)

    def _post(self, message: TextualMessage) -> None:
        # Always through the loop's queue, from the loop as well: keeps the order of posting.
        # A closed loop means the app is gone, and with it everyone who could read this.
        if self._ui_loop is not None:
            with suppress(RuntimeError):
                self._ui_loop.call_soon_threadsafe(
                    self.post_message, message, context=self._in_context
                )

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        if self._ui_loop is not None:
            with suppress(RuntimeError):
                self._ui_loop.call_soon_threadsafe(self._ui_loop.call_later, seconds, call)

    @property
    def transcript(self) -> Transcript:
        """Where everything said is."""
        return self.query_one(Transcript)

    @property
    def chat(self) -> Chat:
        """The branch on the screen, as the engine would be asked."""
        return self.turns.chat.chat()

    @property
    def model_name(self) -> str:
        """As it is written into saved chats."""
        return self.model.name if self.model else ""

    @property
    def context_used(self) -> int:
        """Tokens."""
        return self.query_one(StatusLine).used

    @property
    def context_limit(self) -> int:
        """Tokens; 0 while there is no model."""
        return self.model.context_limit if self.model else 0

    def _new_chat(self) -> Conversation:
        d = self._defaults
        return Conversation(system=d.system, preset=d.preset, thinking=d.thinking)

    # ---- the model -----------------------------------------------------------------------------

    @on(Loading)
    def _loading(self, message: Loading) -> None:
        self.query_one(LoadPanel).show(message.progress)

    @on(Ready)
    async def _ready(self, message: Ready) -> None:
        self.model = model = message.model
        await self.query_one(LoadPanel).remove()
        self.query_one(TitleBar).show(model)
        self.query_one(StatusLine).limit = model.context_limit
        if not self.turns.chat.path:
            words = filter(None, (model.description, self.about, model.where))
            await self.transcript.note("\n".join(words))
        self.files.count()
        self.enter("idle", "ready")
        self.send_if_ready()

    @on(LoadFailed)
    async def _load_failed(self, message: LoadFailed) -> None:
        self.exit_code = message.problem.exit_code
        await self.query_one(LoadPanel).remove()
        await self.transcript.say(ErrorBox("The model could not be loaded", message.problem))
        self.enter("failed", "no model · Ctrl+Q quits")

    # ---- the user ------------------------------------------------------------------------------

    @on(Submitted)
    async def _submitted(self, message: Submitted) -> None:
        match parse(message.text, tuple(PRESETS)):
            case Command() as command:
                self.prompt.accept()
                await self.commands.run(command)
            case BadCommand(text, hint):
                self.notify(f"{text}\n{hint}", severity="warning", markup=False)
            case None if self.state == "idle":
                text, mentioned = files_in(unescape(message.text))
                if mentioned:
                    self.prompt.put(text)
                    for path in mentioned:
                        self.files.add(path)
                if self.files.reading:
                    self._send_later("It will be sent when the document is read. Esc: not yet")
                    return
                self.prompt.accept()
                await self.turns.send(text, self.files.take())
            case None if self.state == "loading":
                self._send_later("It will be sent when the model is loaded. Esc: not yet")
            case None if self.state == "answering":
                self.notify("An answer is running. Esc stops it", markup=False)
            case _:
                self.notify(
                    "There is no model to ask. Ctrl+Q quits", severity="error", markup=False
                )

    def _send_later(self, words: str) -> None:
        self.send_when_ready = True
        self.refresh_bindings()
        self.notify(words, markup=False)

    @on(TextArea.Changed)
    @on(TextArea.SelectionChanged)
    def _typed(self, event: TextArea.Changed | TextArea.SelectionChanged) -> None:
        if event.text_area is self.prompt:
            if isinstance(event, TextArea.Changed):
                self.prompt.picked = 0
            self.query_one(CommandHints).show(self.prompt.suggestions, self.prompt.picked)

    # ---- the chat as a whole -------------------------------------------------------------------

    async def clear_chat(self) -> None:
        """Start a new chat; system prompt, preset and thinking stay."""
        if not self.busy("start a new chat"):
            await self.fresh_chat()
            if self.has_class("-narrow", "listing"):
                self.library.close()

    async def fresh_chat(self) -> None:
        """An empty chat continued as this one was."""
        now = self.turns.chat
        fresh = Conversation(system=now.system, preset=now.preset, thinking=now.thinking)
        await self.turns.begin(fresh)
        self.show_chat()
        self.enter(self.state, "new chat")
        self.library.refresh()

    # ---- keys ----------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Esc is offered while there is something to stop, y while there is something to copy."""
        if action == "stop":
            waiting = self.send_when_ready or self.turns.editing is not None
            return self.state == "answering" or waiting
        if action == "copy_answer":
            quiet = self.state == "idle" and not isinstance(self.focused, Prompt | Spoken)
            return quiet and self.turns.chat.leaf is not None
        return True

    def action_stop(self) -> None:
        """Stop the answer, which is kept; else do not send yet; else leave the edit."""
        if self.state == "answering":
            self.say("stopping")
            if self.bridge is not None:
                self.bridge.cancel()
        elif self.send_when_ready:
            self.send_when_ready = False
            self.notify("Not sent", markup=False)
        else:
            self.turns.end_edit(restore=True)
        self.refresh_bindings()

    def action_copy_answer(self) -> None:
        """Copy the last answer as Markdown."""
        self.commands.copy_answer()

    def action_help(self) -> None:
        """Keys and commands."""
        self.app.push_screen(HelpScreen())

    def action_chats(self) -> None:
        """Open or close the list of chats."""
        self.library.toggle()

    async def action_new(self) -> None:
        """A new chat."""
        await self.clear_chat()

    def action_attach(self) -> None:
        """Choose a document."""

        def chosen(path: Path | None) -> None:
            if path is not None:
                self.files.add(path)

        self.app.push_screen(AttachScreen(Path.cwd()), chosen)

    def action_settings(self) -> None:
        """Preset, thinking, system prompt."""
        self.commands.settings()

    def action_message(self, step: int) -> None:
        """Focus the message before or after; past the last one, the prompt."""
        self.focus_message(step)

    def action_page(self, pages: int) -> None:
        """Scroll the transcript by pages."""
        height = self.transcript.size.height
        self.transcript.scroll_relative(y=pages * max(1, height - 2), animate=False)

    def action_follow(self) -> None:
        """Back to the newest line."""
        self.transcript.follow()

    # ---- what is shown -------------------------------------------------------------------------

    def enter(self, state: State, status: str) -> None:
        """Another state, and what the status line says."""
        self.state = state
        self.say(status)
        self.refresh_bindings()

    def show_chat(self) -> None:
        """Title, preset and thinking of this chat."""
        chat = self.turns.chat
        self.query_one(TitleBar).title(chat.title)
        thinking = "thinks first" if chat.thinking else "no thinking"
        system = " · own system prompt" if chat.system else ""
        self.prompt.border_subtitle = f"{chat.preset} · {thinking}{system}"

    def _show_position(self) -> None:
        self.query_one(StatusLine).more_below = not self.transcript.following

    def close(self) -> None:
        """The window is gone: save what there is, stop what runs; may take some seconds."""
        self.turns.leave()
        self.keeper.close()
        if self.bridge is not None:
            self.bridge.close()
