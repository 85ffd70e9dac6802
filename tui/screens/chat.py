"""The chat: transcript, status line, prompt. Turns messages and keys into what is seen.

Owns the `Chat`; everything that computes runs behind the bridge. States: loading -> idle <->
answering, or failed when there is no engine. Pushed by the app.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Literal

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message as TextualMessage
from textual.screen import Screen
from textual.widgets import Footer, TextArea

from mimo_local.chat import PRESETS, Chat, Message
from mimo_local.events import Stats
from tui.bridge import Bridge, ChatDefaults, EngineFactory
from tui.commands import BadCommand, Command, parse, suggest, unescape
from tui.messages import (
    AnswerDelta,
    AnswerDone,
    AnswerFailed,
    LoadFailed,
    Loading,
    ModelInfo,
    Pace,
    Reading,
    Ready,
    Submitted,
    Tiers,
)
from tui.screens.help import HelpScreen
from tui.widgets.answer import Answer
from tui.widgets.figures import answer_foot, answering_line, reading_line, stats_table
from tui.widgets.hints import CommandHints
from tui.widgets.loading import LoadPanel
from tui.widgets.prompt import Prompt
from tui.widgets.status import StatusLine, TitleBar
from tui.widgets.tiers import TierMeters
from tui.widgets.transcript import ErrorBox, Transcript, Turn, UserMessage

State = Literal["loading", "idle", "answering", "failed"]


class ChatScreen(Screen[None]):
    """One conversation with one model."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("y,ctrl+y", "copy_answer", "Copy answer", key_display="y"),
        Binding("f1", "help", "Help"),
        Binding("pageup", "page(-1)", "Scroll up", show=False),
        Binding("pagedown", "page(1)", "Scroll down", show=False),
        Binding("ctrl+end", "follow", "To the end", show=False),
    ]

    def __init__(self, factory: EngineFactory, defaults: ChatDefaults) -> None:
        super().__init__()
        self._factory, self._defaults = factory, defaults
        self.chat = self._new_chat()
        self.state: State = "loading"
        self.model: ModelInfo | None = None
        self.exit_code = 0
        self.about = ""
        """Said under the model's description; set by `run` before the engine is ready."""
        self.bridge: Bridge | None = None
        self._stats: Stats | None = None
        self._turn: Turn | None = None
        self._send_when_ready = False

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield TitleBar()
        with Transcript(id="transcript"):
            yield LoadPanel()
        yield CommandHints()
        yield TierMeters()
        yield StatusLine()
        yield Prompt(presets=tuple(PRESETS), id="prompt")
        yield Footer(show_command_palette=True)

    def on_mount(self) -> None:
        """Connect the bridge to this screen's message queue and start the load."""
        self.query_one(CommandHints).display = False
        self._show_settings()
        self.prompt.focus()
        self._say("loading · you can type already")
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()

        def post(message: TextualMessage) -> None:
            # Always through the loop's queue, from the loop as well: keeps the order of posting.
            # A closed loop means the app is gone, and with it everyone who could read this.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.post_message, message, context=context)

        def later(seconds: float, call: Callable[[], None]) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(loop.call_later, seconds, call)

        self.bridge = Bridge(post, later, self._factory, self._defaults)
        self.bridge.load()
        self.watch(self.transcript, "scroll_y", self._show_position, init=False)

    @property
    def prompt(self) -> Prompt:
        """Where the user types."""
        return self.query_one(Prompt)

    @property
    def transcript(self) -> Transcript:
        """Where everything said is."""
        return self.query_one(Transcript)

    def _new_chat(self) -> Chat:
        d = self._defaults
        return Chat(messages=[], system=d.system, preset=d.preset, thinking=d.thinking)

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
        private = "Everything stays on this machine."
        await self.transcript.note(
            "\n".join(filter(None, (model.description, self.about, private)))
        )
        self._enter("idle", "ready")
        if self._send_when_ready:
            self._send_when_ready = False
            self.prompt.action_submit()

    @on(LoadFailed)
    async def _load_failed(self, message: LoadFailed) -> None:
        self.exit_code = message.problem.exit_code
        await self.query_one(LoadPanel).remove()
        await self.transcript.say(ErrorBox("The model could not be loaded", message.problem))
        self._enter("failed", "no model · Ctrl+Q quits")

    # ---- the user ------------------------------------------------------------------------------

    @on(Submitted)
    async def _submitted(self, message: Submitted) -> None:
        match parse(message.text, tuple(PRESETS)):
            case Command() as command:
                self.prompt.accept()
                await self._run_command(command)
            case BadCommand(text, hint):
                self.notify(f"{text}\n{hint}", severity="warning", markup=False)
            case None if self.state == "idle":
                self.prompt.accept()
                await self._send(unescape(message.text))
            case None if self.state == "loading":
                self._send_when_ready = True
                self.refresh_bindings()
                self.notify("It will be sent when the model is loaded. Esc: not yet", markup=False)
            case None if self.state == "answering":
                self.notify("An answer is running. Esc stops it", markup=False)
            case _:
                self.notify(
                    "There is no model to ask. Ctrl+Q quits", severity="error", markup=False
                )

    @on(TextArea.Changed)
    def _typed(self, event: TextArea.Changed) -> None:
        self.query_one(CommandHints).show(suggest(event.text_area.text, tuple(PRESETS)))

    async def _run_command(self, command: Command) -> None:
        match command:
            case Command("help"):
                self.action_help()
            case Command("clear"):
                await self.clear_chat()
            case Command("preset", name):
                await self.set_preset(name)
            case Command("system", text):
                await self.set_system(text)
            case Command("think", word):
                self.set_thinking(not self.chat.thinking if word == "toggle" else word == "on")
            case Command("stats"):
                await self.show_stats()
            case Command("regen"):
                await self.regenerate()
            case Command("exit"):
                await self.app.action_quit()

    # ---- one turn ------------------------------------------------------------------------------

    async def _send(self, text: str) -> None:
        self.chat.messages.append(Message("user", text))
        turn = Turn(UserMessage(text), Answer())
        await self.transcript.mount(turn.asked, turn.answer)
        self._ask(turn)

    def _ask(self, turn: Turn) -> None:
        self._turn = turn
        self.transcript.follow()
        self._enter("answering", "reading the prompt")
        if self.bridge is not None:
            self.bridge.ask(self.chat, attempt=turn.attempt)

    @on(Reading)
    def _reading(self, message: Reading) -> None:
        p = message.prefill
        if self.state != "answering":
            return
        if self._turn is not None:
            self._turn.prompt_tokens = p.total
        self._say(reading_line(p))
        self.query_one(StatusLine).used = p.done

    @on(AnswerDelta)
    async def _delta(self, message: AnswerDelta) -> None:
        if self._turn is None:
            return
        await self._turn.answer.add(message.pieces, message.pace)
        self._say(answering_line(message.pace))
        self.query_one(StatusLine).used = self._turn.prompt_tokens + message.pace.tokens

    @on(Tiers)
    def _tiers(self, message: Tiers) -> None:
        self.query_one(TierMeters).show(message.experts, message.disk_bytes_per_token)

    @on(AnswerDone)
    async def _done(self, message: AnswerDone) -> None:
        turn, stats = self._turn, message.stats
        if turn is None:
            return
        if message.reason == "cancelled" and not turn.answer.text and not turn.answer.reasoning:
            self.chat.messages.pop()  # the empty answer, kept by `ask`
            await self._take_back("stopped before the first word")
            return
        self._stats = stats
        self.query_one(TierMeters).show(stats.experts, stats.disk_bytes_per_token)
        foot = answer_foot(message.reason, stats, message.pace)
        await turn.answer.finish(foot, message.pace)
        self.query_one(StatusLine).used = stats.context_used or turn.prompt_tokens
        self._enter("idle", "stopped" if message.reason == "cancelled" else "ready")

    @on(AnswerFailed)
    async def _failed(self, message: AnswerFailed) -> None:
        await self.transcript.say(ErrorBox("No answer", message.problem))
        await self._take_back("the prompt is back below")

    async def _take_back(self, status: str) -> None:
        """Undo the turn: the prompt returns to where it was typed; words already answered stay."""
        turn, self._turn = self._turn, None
        if turn is not None:
            asked = self.chat.messages.pop()
            if turn.answer.text or turn.answer.reasoning:
                await turn.answer.finish("broken off", Pace())
            else:
                await turn.asked.remove()
                await turn.answer.remove()
            self.prompt.put_back(asked.content)
        self.query_one(StatusLine).used = self._stats.context_used if self._stats else 0
        self._enter("idle", status)

    # ---- commands ------------------------------------------------------------------------------

    async def clear_chat(self) -> None:
        """Forget the conversation; system prompt, preset and thinking stay."""
        if self._busy("clear the chat"):
            return
        self.chat.messages.clear()
        if self.bridge is not None:
            self.bridge.forget()
        self._turn = self._stats = None
        await self.transcript.remove_children("UserMessage, Answer, Note, ErrorBox")
        self.query_one(StatusLine).used = 0
        self._enter(self.state, "new chat")

    async def set_preset(self, name: str) -> None:
        """Use a preset from the next answer on; without a name, list them."""
        if not name:
            rows = (
                f"{'●' if n == self.chat.preset else ' '} {n.ljust(10)} {p.description}"
                for n, p in PRESETS.items()
            )
            await self.transcript.note("\n".join(rows))
            return
        self.chat.preset = name
        self._show_settings()
        self._say(f"preset {name}: {PRESETS[name].description}")

    async def set_system(self, text: str) -> None:
        """Replace the system prompt; `-` returns to the model's own, nothing shows it."""
        if not text:
            await self.transcript.note(f"system prompt: {self.chat.system or 'as the model comes'}")
            return
        self.chat.system = "" if text == "-" else text
        self._say("system prompt: the model's own again" if text == "-" else "system prompt set")

    def set_thinking(self, on: bool) -> None:
        """Let the model think before it answers, or not, from the next answer on."""
        self.chat.thinking = on
        self._show_settings()
        self._say(f"thinking {'on' if on else 'off'} from the next answer")

    async def show_stats(self) -> None:
        """Figures of the last answer."""
        s = self._stats
        if s is None:
            await self.transcript.note("no answer yet: nothing measured")
            return
        await self.transcript.note(stats_table(s, kernel=self.model.kernel if self.model else ""))

    async def regenerate(self) -> None:
        """Answer the last prompt again; the old answer leaves the chat."""
        if self._busy("answer again"):
            return
        turn, messages = self._turn, self.chat.messages
        if turn is None or len(messages) < 2:
            self.notify("There is no answer to replace yet", markup=False)
            return
        messages.pop()
        fresh = Answer()
        await self.transcript.mount(fresh, after=turn.answer)
        await turn.answer.remove()
        self._ask(Turn(turn.asked, fresh, attempt=turn.attempt + 1))

    # ---- keys ----------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Esc is offered while there is something to stop, y while there is something to copy."""
        if action == "stop":
            return self.state == "answering" or self._send_when_ready
        if action == "copy_answer":
            return (
                self._turn is not None and self.state == "idle" and self.focused is not self.prompt
            )
        return True

    def action_stop(self) -> None:
        """Stop the answer; it is kept."""
        if self.state == "answering":
            self._say("stopping")
            if self.bridge is not None:
                self.bridge.cancel()
        elif self._send_when_ready:
            self._send_when_ready = False
            self.refresh_bindings()
            self.notify("Not sent", markup=False)

    def action_copy_answer(self) -> None:
        """Copy the last answer as Markdown."""
        if self._turn is None or not self._turn.answer.text:
            self.notify("There is no answer to copy yet", markup=False)
            return
        self.app.copy_to_clipboard(self._turn.answer.text)
        self.notify("Answer copied as Markdown", markup=False)

    def action_help(self) -> None:
        """Keys and commands."""
        self.app.push_screen(HelpScreen())

    def action_page(self, pages: int) -> None:
        """Scroll the transcript by pages."""
        height = self.transcript.size.height
        self.transcript.scroll_relative(y=pages * max(1, height - 2), animate=False)

    def action_follow(self) -> None:
        """Back to the newest line."""
        self.transcript.follow()

    def _enter(self, state: State, status: str) -> None:
        self.state = state
        self._say(status)
        self.refresh_bindings()

    def _say(self, text: str) -> None:
        self.query_one(StatusLine).activity = text

    def _show_settings(self) -> None:
        thinking = "thinks first" if self.chat.thinking else "no thinking"
        self.prompt.border_subtitle = f"{self.chat.preset} · {thinking}"

    def _show_position(self) -> None:
        self.query_one(StatusLine).more_below = not self.transcript.following

    def _busy(self, wish: str) -> bool:
        if self.state == "answering":
            self.notify(f"Stop the answer first (Esc) to {wish}", markup=False)
        return self.state == "answering"
