"""What the slash commands and the palette do to the chat on the screen.

One method per command that needs more than a line; called by the chat screen and the app.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import SystemCommand

from mimo_local.chat import PRESETS
from tui.commands import Command
from tui.screens.dialogs import ChatSettings, SettingsScreen
from tui.widgets.figures import stats_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tui.screens.chat import ChatScreen


class Commands:
    """The chat's commands."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen

    async def run(self, command: Command) -> None:
        """Do what was typed."""
        screen = self._screen
        match command:
            case Command("help"):
                screen.action_help()
            case Command("clear"):
                await screen.clear_chat()
            case Command("preset", name):
                await self.set_preset(name)
            case Command("system", text):
                await self.set_system(text)
            case Command("think", word):
                self.set_thinking(
                    not screen.turns.chat.thinking if word == "toggle" else word == "on"
                )
            case Command("stats"):
                await self.show_stats()
            case Command("regen"):
                await self.regenerate()
            case Command("edit", text):
                self.edit(text)
            case Command("exit"):
                await screen.app.action_quit()
            case Command(name, text):
                self._more(name, text)

    def _more(self, name: str, text: str) -> None:
        """Those that concern files and saved chats."""
        screen = self._screen
        match name:
            case "chats":
                screen.library.toggle()
            case "file" if text == "-":
                screen.files.replace(())
            case "file" if text:
                screen.files.add(Path(text))
            case "file":
                screen.action_attach()
            case "rename":
                screen.library.rename(new=text)
            case "save":
                screen.library.export(to=text)
            case "import":
                screen.library.import_file(text)
            case "settings":
                self.settings()

    def palette(self) -> Iterable[SystemCommand]:
        """Every command, and every preset, for the command palette."""
        screen, chat = self._screen, self._screen.turns.chat
        yield SystemCommand("Help", "Keys and commands", screen.action_help)
        yield SystemCommand("New chat", "/clear", screen.clear_chat)
        yield SystemCommand("Chats", "Saved chats and search, /chats", screen.library.toggle)
        yield SystemCommand("Rename this chat", "/rename", screen.library.rename)
        yield SystemCommand("Export this chat", "Markdown or JSON, /save", screen.library.export)
        yield SystemCommand("Import chats", "/import", screen.library.import_file)
        yield SystemCommand("Attach a document", "/file", screen.action_attach)
        yield SystemCommand("Answer again", "/regen", self.regenerate)
        yield SystemCommand("Edit the last prompt", "/edit", self.edit)
        yield SystemCommand("Copy the answer", "As Markdown", self.copy_answer)
        yield SystemCommand("Figures", "/stats", self.show_stats)
        yield SystemCommand("Settings of this chat", "/settings", self.settings)
        yield SystemCommand(
            "System prompt", "/system", partial(screen.prompt.put, f"/system {chat.system}")
        )
        on = not chat.thinking
        yield SystemCommand(
            f"Thinking {'on' if on else 'off'}", "/think", partial(self.set_thinking, on)
        )
        for name, preset in PRESETS.items():
            yield SystemCommand(
                f"Preset {name}", preset.description, partial(self.set_preset, name)
            )

    async def set_preset(self, name: str) -> None:
        """Use a preset from the next answer on; without a name, list them."""
        chat = self._screen.turns.chat
        if not name:
            rows = (
                f"{'●' if n == chat.preset else ' '} {n.ljust(10)} {p.description}"
                for n, p in PRESETS.items()
            )
            await self._screen.transcript.note("\n".join(rows))
            return
        chat.preset = name
        self._changed(f"preset {name}: {PRESETS[name].description}")

    async def set_system(self, text: str) -> None:
        """Replace the system prompt; `-` returns to the model's own, nothing shows it."""
        chat = self._screen.turns.chat
        if not text:
            now = chat.system or "as the model comes"
            await self._screen.transcript.note(f"system prompt: {now}")
            return
        chat.system = "" if text == "-" else text
        self._changed(
            "system prompt: the model's own again" if text == "-" else "system prompt set"
        )

    def set_thinking(self, on: bool) -> None:
        """Let the model think before it answers, or not, from the next answer on."""
        self._screen.turns.chat.thinking = on
        self._changed(f"thinking {'on' if on else 'off'} from the next answer")

    def settings(self) -> None:
        """All three on one page."""
        chat = self._screen.turns.chat

        def answer(new: ChatSettings | None) -> None:
            if new is not None:
                chat.preset, chat.thinking, chat.system = new.preset, new.thinking, new.system
                self._changed("settings of this chat changed")

        now = ChatSettings(chat.preset, chat.thinking, chat.system)
        self._screen.app.push_screen(SettingsScreen(now), answer)

    async def show_stats(self) -> None:
        """Figures of the last answer."""
        screen = self._screen
        stats = screen.turns.stats
        if stats is None:
            await screen.transcript.note("no answer yet: nothing measured")
            return
        kernel = screen.model.kernel if screen.model else ""
        await screen.transcript.note(stats_table(stats, kernel=kernel))

    async def regenerate(self) -> None:
        """Answer the last prompt again; the old answer stays as a branch."""
        screen = self._screen
        if screen.busy("answer again"):
            return
        if screen.state != "idle" or not await screen.turns.regenerate():
            screen.notify("There is no prompt to answer again yet", markup=False)

    def edit(self, text: str = "") -> None:
        """Write the last prompt anew, with a `text` at once."""
        screen = self._screen
        leaf = screen.turns.chat.leaf
        if screen.busy("edit a prompt"):
            return
        if leaf is None or not screen.turns.edit(leaf):
            screen.notify("There is no prompt to edit yet", markup=False)
        elif text:
            screen.prompt.put(text)
            screen.prompt.action_submit()

    def copy_answer(self) -> None:
        """Copy the last answer as Markdown."""
        screen = self._screen
        said = [n for n in screen.turns.chat.path if n.role == "assistant" and n.message.content]
        if not said:
            screen.notify("There is no answer to copy yet", markup=False)
            return
        screen.app.copy_to_clipboard(said[-1].message.content)
        screen.notify("Answer copied as Markdown", markup=False)

    def _changed(self, words: str) -> None:
        screen = self._screen
        screen.keeper.set_options(screen.turns.chat)
        screen.show_chat()
        screen.say(words)
