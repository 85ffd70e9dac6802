"""The help page and the palette name everything there is; the keys it promises exist."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fakes import FakeEngine
from stage import staged
from textual.binding import Binding

from tui.app import MimoApp
from tui.commands import COMMANDS
from tui.screens.chat import ChatScreen
from tui.screens.help import KEYS
from tui.widgets.answer import Answer
from tui.widgets.chats import ChatOptions, ChatSearch
from tui.widgets.chips import Chip
from tui.widgets.prompt import Prompt
from tui.widgets.spoken import Spoken
from tui.widgets.transcript import Earlier

OWNERS = (MimoApp, ChatScreen, Prompt, Spoken, Answer, ChatOptions, ChatSearch, Chip, Earlier)
SPELLED = {
    "esc": "escape",
    "del": "delete",
    "/": "slash",
    "palette": "ctrl+p",
    "j": "j",
    "k": "k",
}
TEXTUALS = {"ctrl+p", "tab", "up", "down"}
"""Promised by the help page and kept by Textual or by the prompt's own key handling."""


def promised() -> set[str]:
    """Every key the help page names."""
    found = set()
    for _, rows in KEYS:
        for left, right in rows:
            words = left
            if "Tab" in right and left.startswith(("@", "/command")):
                words += ", Tab"
            words += "".join(f", {k}" for k in re.findall(r"Ctrl\+End|(?<=also )Tab", right))
            for word in re.split(r", | or ", words):
                key = word.strip().lower()
                if key.startswith(("@", "/c")):
                    continue
                found.add(SPELLED.get(key, key))
    return found


def bound() -> dict[str, str]:
    """Every key of ours and what it does."""
    found = {}
    for owner in OWNERS:
        for binding in owner.BINDINGS:
            assert isinstance(binding, Binding)
            for key in binding.key.split(","):
                found[key.strip()] = f"{owner.__name__}: {binding.description}"
    return found


def test_every_binding_is_on_the_help_page() -> None:
    missing = {key: what for key, what in bound().items() if key not in promised()}
    # Backspace does what Delete does; alt+enter is one more way to break a line.
    assert set(missing) <= {"backspace"}, missing


def test_the_help_page_promises_nothing_that_is_not_there() -> None:
    extra = promised() - set(bound()) - TEXTUALS - {"shift+enter"}
    assert not extra


async def test_the_chosen_theme_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "data" / "theme"
    for before, choice in (("mimo", "nord"), ("nord", "ansi-dark"), ("ansi-dark", "mimo")):
        app = MimoApp(lambda on_event: FakeEngine(), theme_file=file)
        async with app.run_test() as pilot:
            assert app.theme == before
            app.theme = choice
            await pilot.pause()
        await asyncio.to_thread(app.close)
    file.write_text("no-such-theme")
    assert MimoApp(lambda on_event: FakeEngine(), theme_file=file).theme == "mimo"
    file.write_bytes(b"\xff")
    assert MimoApp(lambda on_event: FakeEngine(), theme_file=file).theme == "mimo"


async def test_the_palette_has_every_command() -> None:
    async with staged(FakeEngine()) as stage:
        titles = [f"{c.title} {c.help}" for c in stage.app.get_system_commands(stage.screen)]
        in_palette = {name for t in titles for name in re.findall(r"/(\w+)", t)}
        others = {"help", "exit", "preset"}  # Help, Quit and one entry per preset
        assert {c.name for c in COMMANDS} - others <= in_palette
        for words in ("Help", "Quit", "Preset math", "Theme"):
            assert any(t.startswith(words) for t in titles), words
