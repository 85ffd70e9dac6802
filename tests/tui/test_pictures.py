"""Pictures of every screen; `--snapshot-update` and `picture.py` make them anew: look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from picture import (
    ANSWER,
    IMAGES,
    PICTURES,
    QUESTION,
    THINKING,
    app_for,
    ask,
    canned,
    make_history,
    same_everywhere,
    settle,
)
from textual.pilot import Pilot

from mimo_local.errors import ContextOverflowError
from tui.screens.dialogs import FileTree
from tui.widgets.answer import Thinking
from tui.widgets.chats import ChatOptions
from tui.widgets.chips import Chip
from tui.widgets.prompt import Prompt

SMALL, LARGE = (80, 24), (120, 36)
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x36"])


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with same_everywhere():
        yield


def test_an_answer_with_its_thinking_open(snap_compare) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, QUESTION)
        screen = pilot.app.screen
        screen.query_one(Thinking).collapsed = False
        await pilot.pause(0.1)
        screen.query_one("#transcript").scroll_home(animate=False)
        await pilot.pause(0.1)

    engine = canned(f"<think>{THINKING}</think>", ANSWER)
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


def test_an_error_and_the_prompt_back(snap_compare) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, "Summarise this:\n" + "[bold]a very long document[/bold]")

    error = ContextOverflowError(
        "the prompt has 9,310 tokens, the context holds 8,192",
        hint="shorten it or start with `--context 16384`",
    )
    engine = canned(error=error)
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


def test_a_message_with_the_focus_and_two_branches(snap_compare) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, QUESTION)
        await ask(pilot, "/regen")
        await pilot.press("alt+up", "left")
        await pilot.pause(0.2)

    engine = canned(ANSWER)
    engine.queue("Another answer.")
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


@SIZES
@pytest.mark.parametrize("typed", ["", "lag"], ids=["all", "search"])
def test_the_list_of_chats(snap_compare, tmp_path: Path, size, typed: str) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, QUESTION)
        await pilot.press("f2")
        options = pilot.app.screen.query_one(ChatOptions)
        await settle(pilot, lambda: len(options.rows) == 5)
        await pilot.press(*typed)
        await settle(pilot, lambda: not typed or len(options.rows) == 1)
        pilot.app.screen.query_one("#chat-search").cursor_blink = False
        await pilot.pause(0.1)

    app = app_for(canned("At dusk."), make_history(tmp_path / "history.db"))
    assert snap_compare(app, terminal_size=size, run_before=play)


async def open_delete(pilot: Pilot[None]) -> None:
    await pilot.press("f2")
    options = pilot.app.screen.query_one(ChatOptions)
    await settle(pilot, lambda: len(options.rows) == 4)
    await pilot.press("down", "d")


async def open_rename(pilot: Pilot[None]) -> None:
    await pilot.press("f2")
    options = pilot.app.screen.query_one(ChatOptions)
    await settle(pilot, lambda: len(options.rows) == 4)
    await pilot.press("down", "r")
    pilot.app.screen.query_one("Input").cursor_blink = False


async def open_attach(pilot: Pilot[None]) -> None:
    await pilot.press("ctrl+o")
    tree = pilot.app.screen.query_one(FileTree)
    await settle(pilot, lambda: len(tree.root.children) == 2)


async def open_settings(pilot: Pilot[None]) -> None:
    await pilot.press("f4")
    await pilot.pause(0.1)


async def open_help(pilot: Pilot[None]) -> None:
    await pilot.press("f1")


@SIZES
@pytest.mark.parametrize(
    "open_it", [open_delete, open_rename, open_attach, open_settings, open_help]
)
def test_every_dialog(
    snap_compare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size,
    open_it: Callable[[Pilot[None]], object],
) -> None:
    folder = tmp_path / "papers"
    (folder / "old").mkdir(parents=True)
    (folder / "log.md").write_text("20:00 the lamp is lit")
    monkeypatch.chdir(folder)

    async def play(pilot: Pilot[None]) -> None:
        pilot.app.screen.query_one(Prompt).cursor_blink = False
        await settle(pilot, lambda: pilot.app.chat_screen.state == "idle")
        await open_it(pilot)
        await pilot.pause(0.2)

    app = app_for(canned(), make_history(tmp_path / "history.db"))
    assert snap_compare(app, terminal_size=size, run_before=play)


def test_documents_above_the_prompt(snap_compare, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "log.md").write_text("20:00 the lamp is lit\n" * 20)
    (tmp_path / "plan.txt").write_text("trim the wick\n" * 900)
    monkeypatch.chdir(tmp_path)

    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, QUESTION)
        for name in ("log.md", "plan.txt"):
            pilot.app.screen.query_one(Prompt).put(f"/file {name}")
            await pilot.press("enter")
        await settle(
            pilot,
            lambda: (
                [c.file.tokens is not None for c in pilot.app.screen.query(Chip)] == [True, True]
            ),
        )
        pilot.app.screen.query_one(Prompt).put("What does @p")
        await pilot.pause(0.2)

    engine = canned("At dusk.")
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


@pytest.mark.parametrize("name", PICTURES)
async def test_the_readme_shows_todays_screen(name: str, request: pytest.FixtureRequest) -> None:
    picture = await PICTURES[name]()
    if request.config.getoption("--update-golden"):
        (IMAGES / name).write_text(picture, encoding="utf-8")
    assert picture == (IMAGES / name).read_text(encoding="utf-8"), "run tests/tui/picture.py"
