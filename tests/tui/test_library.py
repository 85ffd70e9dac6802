"""Saved chats in the window: list, search, open, rename, delete, export, import, sudden ends."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from fakes import FakeEngine
from stage import LARGE, SMALL, Gated, staged
from textual.widgets import Input

from mimo_local.chat import Message
from mimo_local.history import History
from tui.screens.dialogs import AskScreen, ConfirmScreen, SettingsScreen
from tui.screens.library import file_name
from tui.widgets.chats import ChatOptions, ago
from tui.widgets.status import StatusLine
from tui.widgets.transcript import UserMessage

SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """A history with two chats, one of them with two branches."""
    path = tmp_path / "history.db"
    with History.open(path) as history:
        tides = history.new_chat(preset="math", thinking=True, system="Be brief.")
        asked = history.add(tides, Message("user", "Why do tides lag?"), parent=None)
        history.add(tides, Message("assistant", "Because of friction."), parent=asked)
        history.add(tides, Message("assistant", "Because of inertia."), parent=asked)
        lamp = history.new_chat()
        asked = history.add(lamp, Message("user", "How bright is a lamp?"), parent=None)
        history.add(lamp, Message("assistant", "Very bright."), parent=asked)
    return path


LAMP = 2
"""The chat that was changed last."""


def saved(path: Path) -> dict[str, list[str]]:
    """Title -> the active branch of every chat."""
    with History.open(path) as history:
        return {
            c.title: [m.message.content for m in history.messages(c.id)] for c in history.chats()
        }


async def open_list(stage, rows: int) -> None:
    await stage.pilot.press("f2")
    await stage.until(lambda: len(stage.screen.query_one(ChatOptions).rows) == rows)


@SIZES
async def test_the_list_opens_beside_the_chat_or_over_it(db: Path, size) -> None:
    async with staged(FakeEngine(), size=size, history=db) as stage:
        await open_list(stage, 2)
        assert "Why do tides lag?" in stage.text()
        assert "just now · 3 messages" in stage.text()
        assert "2 chats" in stage.text()
        assert ("Ask something" in stage.text()) == (size == LARGE)
        await stage.pilot.press("escape")
        assert "2 chats" not in stage.text()
        assert stage.app.focused is stage.screen.prompt


async def test_titles_are_cut_to_the_width_there_is_also_when_it_changes(db: Path) -> None:
    with History.open(db) as history:
        chat = history.new_chat()
        words = "Which clauses of the contract with the port authority end it early?"
        history.add(chat, Message("user", words), parent=None)
    async with staged(FakeEngine(), size=LARGE, history=db) as stage:
        await open_list(stage, 3)
        await stage.until(lambda: "Which clauses" in stage.text())
        assert "port authority" not in stage.text()
        await stage.pilot.resize_terminal(90, 24)  # the list alone, as wide as the window
        await stage.until(lambda: "port authority" in stage.text())
        await stage.pilot.resize_terminal(*LARGE)
        await stage.until(lambda: "port authority" not in stage.text())


@SIZES
async def test_search_as_one_types_and_go_to_the_place(db: Path, size) -> None:
    async with staged(FakeEngine(), size=size, history=db) as stage:
        await open_list(stage, 2)
        await stage.pilot.press(*"fric")
        await stage.until(lambda: "1 place found" in stage.text())
        assert "friction" in stage.text()
        assert "How bright" not in stage.text()
        await stage.pilot.press("enter")
        # The hit lies on the branch that is not the active one: it is shown, and has the focus.
        await stage.until(lambda: "Because of friction." in stage.text())
        assert "‹ 1/2 ›" in stage.text()
        assert stage.app.focused is stage.transcript.spoken[1]
        assert "math · thinks first · own system prompt" in stage.text()


async def test_nothing_found_is_said_and_esc_empties_the_field_first(db: Path) -> None:
    async with staged(FakeEngine(), history=db) as stage:
        await open_list(stage, 2)
        await stage.pilot.press(*"zebra")
        await stage.until(lambda: "nothing found" in stage.text())
        await stage.pilot.press("escape")
        await stage.until(lambda: "2 chats" in stage.text())
        await stage.pilot.press("escape")
        await stage.until(lambda: "Ask something" in stage.text())


async def test_an_opened_chat_goes_on_as_it_was(db: Path) -> None:
    engine = FakeEngine(["More about it."])
    async with staged(engine, history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        assert "How bright is a lamp?" in stage.text().splitlines()[0], "its title"
        await open_list(stage, 2)
        await stage.pilot.press("down", "down", "enter")
        await stage.until(lambda: "Because of inertia." in stage.text())
        assert stage.app.focused is stage.screen.prompt
        await stage.ask("And at night?")
        request = engine.requests[0]
        assert "Be brief." in request.prompt
        assert "Because of inertia." in request.prompt
        assert request.params.temperature == 0.4
    assert saved(db)["Why do tides lag?"] == [
        *("Why do tides lag?", "Because of inertia."),
        *("And at night?", "More about it."),
    ]


async def test_everything_is_saved_as_it_happens(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    engine = Gated(["one ", "two ", "three ", "four"], at=3)
    async with staged(engine, history=path) as stage:
        await stage.send("count")
        await stage.until(lambda: path.exists() and "count" in saved(path))
        assert saved(path)["count"][0] == "count", "before the first word of the answer"
        await stage.until(lambda: "one two" in stage.text())
        await stage.until(lambda: saved(path)["count"][1:] == ["one two "])
        engine.gate.set()
        await stage.idle()
        await stage.until(lambda: saved(path)["count"][1:] == ["one two three four"])
        await stage.send("/regen")
        await stage.until(lambda: "‹ 2/2 ›" in stage.text())
        await stage.idle()
        await stage.until(lambda: saved(path)["count"] == ["count", "fake answer"])
        await stage.pilot.press("alt+up", "left")
        await stage.until(lambda: saved(path)["count"] == ["count", "one two three four"])
        await stage.send("/preset code")
        await stage.until(lambda: not stage.screen.prompt.text)
    with History.open(path) as history:
        last = history.last()
        assert last is not None
        assert (last.preset, last.n_branches, last.model) == ("code", 2, "fake")


async def test_leaving_in_the_middle_of_an_answer_keeps_its_words(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    engine = FakeEngine()
    engine.queue("some ", "words", hold=True)
    async with staged(engine, history=path) as stage:
        await stage.send("q")
        await stage.until(lambda: "some words" in stage.text())
        await stage.pilot.press("ctrl+q")
    assert saved(path) == {"q": ["q", "some words"]}


async def test_a_question_without_an_answer_is_there_and_can_be_answered(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    with History.open(path) as history:
        history.add(history.new_chat(), Message("user", "lost question"), parent=None)
    engine = FakeEngine(["found"])
    async with staged(engine, history=path, resume=1) as stage:
        await stage.until(lambda: "no answer yet" in stage.text())
        await stage.send("/regen")
        await stage.until(lambda: "found" in stage.text())
        await stage.idle()
    assert saved(path)["lost question"] == ["lost question", "found"]


async def test_a_new_chat_leaves_the_old_one_in_the_list(db: Path) -> None:
    async with staged(FakeEngine(["a"]), history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        await stage.pilot.press("ctrl+n")
        await stage.until(lambda: not stage.screen.query(UserMessage))
        assert stage.screen.query_one(StatusLine).used == 0
        await stage.ask("something else")
        await open_list(stage, 3)
        assert "● something else" in stage.text()
    assert saved(db)["How bright is a lamp?"][-1] == "Very bright."


async def test_rename_by_key_and_by_command(db: Path) -> None:
    async with staged(FakeEngine(), history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        await stage.send("/rename Lamps")
        await stage.until(lambda: "Lamps" in stage.text().splitlines()[0])
        await open_list(stage, 2)
        await stage.pilot.press("down", "down", "r")
        await stage.until(lambda: isinstance(stage.app.screen, AskScreen))
        await stage.pilot.press("ctrl+u", *"Tides", "enter")
        await stage.until(lambda: "Tides" in stage.text() and stage.app.screen is stage.screen)
        await stage.until(lambda: set(saved(db)) == {"Lamps", "Tides"})


async def test_delete_asks_and_enter_alone_does_not(db: Path) -> None:
    async with staged(FakeEngine(), history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        await open_list(stage, 2)
        for keys in (("enter",), ("escape",), ("n",)):
            await stage.pilot.press("down", "home", "d")
            await stage.until(lambda: isinstance(stage.app.screen, ConfirmScreen))
            assert "Delete “How bright" in stage.text()
            await stage.pilot.press(*keys)
            await stage.until(lambda: stage.app.screen is stage.screen)
        assert len(saved(db)) == 2
        await stage.pilot.press("d")
        await stage.until(lambda: isinstance(stage.app.screen, ConfirmScreen))
        await stage.pilot.press("y")
        await stage.until(lambda: list(saved(db)) == ["Why do tides lag?"])
        # It was the chat on the screen: that is empty now, and another question is a new chat.
        await stage.until(lambda: not stage.screen.query(UserMessage))
        await stage.pilot.press("escape")
        await stage.ask("afresh")
        await stage.until(lambda: set(saved(db)) == {"Why do tides lag?", "afresh"})


async def test_export_asks_where_and_before_it_replaces(db: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    async with staged(FakeEngine(), size=LARGE, history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        await stage.send("/save")
        await stage.until(lambda: isinstance(stage.app.screen, AskScreen))
        assert "how-bright-is-a-lamp.md" in stage.text()
        stage.app.screen.query_one(Input).value = str(tmp_path / "no" / "x.md")
        await stage.pilot.press("enter")
        await stage.until(lambda: "there is no folder" in stage.text())
        await stage.pilot.press("escape")
        for text, key in (("Very bright.", None), ("precious", "n"), ("Very bright.", "y")):
            if key:
                out.write_text("precious")
            await stage.send(f"/save {out}")
            if key:
                await stage.until(lambda: isinstance(stage.app.screen, ConfirmScreen))
                await stage.pilot.press(key)
            await stage.until(lambda text=text: out.exists() and text in out.read_text())
        await stage.send(f"/save {tmp_path / 'out.json'}")
        await stage.until(lambda: "Exported to" in stage.text())
        assert json.loads((tmp_path / "out.json").read_text())
        await stage.send(f"/import {tmp_path / 'out.json'}")
        await stage.until(lambda: "Imported 1 chat" in stage.text())
        await open_list(stage, 3)


async def test_a_bad_import_says_what_would_do(db: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    async with staged(FakeEngine(), size=LARGE, history=db) as stage:
        await stage.send(f"/import {bad}")
        await stage.until(lambda: "is no JSON" in stage.text())


async def test_a_full_disk_is_said_once_and_the_chat_goes_on(db: Path) -> None:
    other = sqlite3.connect(db)
    other.execute("CREATE TRIGGER t BEFORE INSERT ON chats BEGIN SELECT raise(ABORT, 'full'); END")
    async with staged(FakeEngine(["a1"], ["a2"]), size=LARGE, history=db) as stage:
        await stage.ask("one")
        await stage.until(lambda: "This chat is not being saved" in stage.text())
        await stage.ask("two")
        assert stage.text().count("This chat is not being saved") == 1
        assert [m.content for m in stage.screen.chat.messages] == ["one", "a1", "two", "a2"]
        other.execute("DROP TRIGGER t")
        other.close()
        await stage.ask("three")
    assert saved(db)["one"][:3] == ["one", "a1", "two"], "what was missed was saved later"


async def test_without_saving_the_list_says_so() -> None:
    async with staged(FakeEngine()) as stage:
        await stage.pilot.press("f2")
        await stage.until(lambda: "Chats are not saved" in stage.text())
        assert stage.app.focused is stage.screen.prompt


async def test_another_chat_is_not_opened_over_a_running_answer(db: Path) -> None:
    engine = FakeEngine()
    engine.queue("words", hold=True)
    async with staged(engine, size=LARGE, history=db) as stage:
        await stage.send("go")
        await stage.until(lambda: "words" in stage.text())
        await open_list(stage, 3)
        await stage.pilot.press("down", "end", "enter")
        await stage.until(lambda: "Stop the answer first" in stage.text())
        await stage.pilot.press("escape", "escape")
        await stage.idle()
        assert stage.screen.chat.messages[-1].content == "words"


def test_times_and_file_names() -> None:
    assert [ago(s) for s in (5, 120, 7300, 90_000, 200_000)] == [
        *("just now", "2 min ago", "2 h ago", "1 day ago", "2 days ago"),
    ]
    assert len(ago(90 * 86400)) == len("2026-01-01")
    assert file_name("Why? ../../etc/passwd & more") == "why-etc-passwd-more.md"
    assert file_name("///") == "chat.md"
    assert file_name("灯塔 的 光") == "灯塔-的-光.md"


async def test_settings_of_a_chat_by_keyboard_are_kept(db: Path) -> None:
    async with staged(FakeEngine(), history=db, resume=LAMP) as stage:
        await stage.until(lambda: "Very bright." in stage.text())
        await stage.pilot.press("f4")
        await stage.until(lambda: isinstance(stage.app.screen, SettingsScreen))
        assert "●▌ chat" in stage.text()
        assert "○▌ code" in stage.text(), "told apart without colour"
        await stage.pilot.press("down", "down", "enter", "tab", "space", "tab")
        await stage.pilot.press(*"Hi", "ctrl+s")
        await stage.until(lambda: stage.app.screen is stage.screen)
        assert "code · thinks first · own system prompt" in stage.text()
        await stage.pilot.press("f4", "escape")  # changed my mind
        await stage.until(lambda: stage.app.screen is stage.screen)
    with History.open(db) as history:
        info = history.chat(LAMP)
    assert (info.preset, info.thinking, info.system) == ("code", True, "Hi")
