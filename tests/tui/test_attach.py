"""Documents of the prompt: mentions, dialog, chips, counts, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from stage import LARGE, staged
from textual.widgets import Input

from mimo_local.errors import ContextOverflowError
from tui.mentions import Offer, files_in, mention_at, offers
from tui.messages import FileInfo
from tui.screens.dialogs import AttachScreen, FileTree
from tui.widgets.chips import Chip, room


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with three documents."""
    (tmp_path / "notes.md").write_text("# Notes\n\nThe lamp was lit at dusk.\n")
    (tmp_path / "my plan.txt").write_text("Trim the wick.")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt").write_text("deep down")
    (tmp_path / ".hidden").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- mentions, without a window ------------------------------------------------------------------


def test_offers_are_what_begins_so(folder: Path) -> None:
    assert offers("") == (
        Offer("sub/", True),
        Offer("broken.pdf", False),
        Offer("my\\ plan.txt", False),
        Offer("notes.md", False),
    )
    assert offers("NO") == (Offer("notes.md", False),)
    assert offers("sub/") == (Offer("sub/deep.txt", False),)
    assert offers("./sub/d") == (Offer("./sub/deep.txt", False),)
    assert offers(str(folder) + "/not") == (Offer(f"{folder}/notes.md", False),)
    assert offers(".h") == (Offer(".hidden", False),)
    assert offers("no/such/folder") == ()


def test_only_files_that_exist_are_mentions(folder: Path) -> None:
    text, files = files_in("Sum up @notes.md and @my\\ plan.txt, thanks")
    assert text == "Sum up notes.md and @my\\ plan.txt, thanks", "the comma belongs to the word"
    assert files == (Path("notes.md"),)
    assert files_in('see @"my plan.txt" now') == ("see my plan.txt now", (Path("my plan.txt"),))
    for words in ("ask @anna", "a@notes.md", "@", "@sub", "mail me@home.org", "@no\0tes"):
        assert files_in(words) == (words, ())


@given(st.text(max_size=40), st.integers(0, 40))
def test_a_mention_is_found_where_the_cursor_is(text: str, cursor: int) -> None:
    found = mention_at(text, cursor)
    if found is not None:
        at, typed = found
        assert text[at] == "@"
        assert text[at : at + 1 + len(typed)] == text[at:cursor]
    files_in(text)


def test_what_is_left_of_the_context() -> None:
    def file(tokens: int | None) -> FileInfo:
        return FileInfo(1, "f", tokens, "x")

    assert room([], 0, 100) == ""
    assert room([file(30)], 20, 100) == "50 tokens left in the context"
    assert room([file(30), file(40)], 20, 100) == "70 tokens together, 10 left in the context"
    assert "too long for the context by 40 tokens" in room([file(30), file(90)], 20, 100)
    assert room([file(None)], 0, 100) == room([file(3)], 0, 0) == ""


# ---- in the window -------------------------------------------------------------------------------


async def test_tab_completes_a_path_and_attaches_the_file(folder: Path) -> None:
    engine = FakeEngine(["At dusk."])
    async with staged(engine) as stage:
        await stage.type("When? @s")
        assert "@sub/" in stage.text()
        await stage.pilot.press("tab")
        assert stage.screen.prompt.text == "When? @sub/"
        assert "@sub/deep.txt" in stage.text()
        await stage.type("When? @no")
        await stage.pilot.press("tab")
        assert stage.screen.prompt.text == "When? notes.md "
        await stage.until(lambda: "notes.md 34 tokens" in stage.text())
        assert "left in the context" in stage.text()
        await stage.ask("When? notes.md")
        assert "Document notes.md:\n\n# Notes" in engine.requests[0].prompt
        assert not stage.screen.query(Chip), "sent with this question only"
        assert "▤ notes.md · 34 characters" in stage.text()
        assert stage.screen.chat.messages[0].attachments[0].name == "notes.md"


async def test_a_typed_mention_is_read_before_the_question_goes(folder: Path) -> None:
    engine = FakeEngine(["a"])
    async with staged(engine) as stage:
        await stage.ask("Sum up @notes.md")
        assert "lit at dusk" in engine.requests[0].prompt
        assert stage.screen.chat.messages[0].content == "Sum up notes.md"


async def test_a_file_that_cannot_be_read_keeps_the_prompt(folder: Path) -> None:
    engine = FakeEngine()
    async with staged(engine, size=LARGE) as stage:
        await stage.send("Sum up @broken.pdf")
        await stage.until(lambda: "Not attached" in stage.text())
        assert stage.screen.prompt.text == "Sum up broken.pdf"
        assert engine.requests == []
        await stage.send("/file nowhere.txt")
        await stage.until(lambda: "there is no file" in stage.text())


async def test_a_chip_is_taken_off_by_key_and_by_click(folder: Path) -> None:
    async with staged(FakeEngine()) as stage:
        for name in ("notes.md", "my plan.txt", "notes.md"):
            await stage.send(f"/file {name}")
        await stage.until(lambda: "my plan.txt 14 tokens" in stage.text())
        assert len(stage.screen.query(Chip)) == 2, "the same file twice is once"
        assert "48 tokens together" in stage.text()
        stage.screen.query(Chip).first().focus()
        await stage.pilot.press("delete")
        await stage.until(lambda: len(stage.screen.query(Chip)) == 1)
        assert stage.app.focused is stage.screen.prompt
        lines = stage.text().splitlines()
        row = next(n for n, line in enumerate(lines) if "✕" in line)
        await stage.pilot.click(offset=(lines[row].index("✕"), row))
        await stage.until(lambda: not stage.screen.query(Chip))


async def test_too_much_is_said_before_it_is_sent(folder: Path) -> None:
    (folder / "long.txt").write_text("word " * 200)
    async with staged(FakeEngine(context_limit=500)) as stage:
        await stage.send("/file long.txt")
        await stage.until(lambda: "too long for the context by 499 tokens" in stage.text())


async def test_documents_come_back_with_a_prompt_that_failed(folder: Path) -> None:
    engine = FakeEngine()
    engine.queue(error=ContextOverflowError("too long", hint="cut it"))
    async with staged(engine) as stage:
        await stage.ask("Sum up @notes.md")
        assert stage.screen.prompt.text == "Sum up notes.md"
        await stage.until(lambda: "notes.md 34 tokens" in stage.text())
        await stage.ask("Sum up notes.md")
        assert "lit at dusk" in engine.requests[1].prompt


async def test_an_edited_question_keeps_its_documents(folder: Path) -> None:
    engine = FakeEngine(["a"], ["b"])
    async with staged(engine) as stage:
        await stage.ask("Sum up @notes.md")
        await stage.pilot.press("alt+up", "e")
        await stage.until(lambda: stage.screen.query(Chip))
        await stage.pilot.press(*" now", "enter")
        await stage.until(lambda: len(engine.requests) == 2)
        await stage.idle()
        assert "lit at dusk" in engine.requests[1].prompt
        assert not stage.screen.query(Chip)


async def test_the_dialog_by_keyboard(folder: Path) -> None:
    async with staged(FakeEngine()) as stage:
        await stage.pilot.press("ctrl+o")
        await stage.until(lambda: isinstance(stage.app.screen, AttachScreen))
        await stage.until(lambda: "notes.md" in stage.text() and ".hidden" not in stage.text())
        dialog = stage.app.screen
        tree = dialog.query_one(FileTree)
        await stage.until(lambda: len(tree.root.children) == 4)
        dialog.query_one(Input).focus()
        dialog.query_one(Input).value = "nowhere.txt"
        await stage.pilot.press("enter")
        await stage.until(lambda: "there is no file" in stage.text())
        tree.focus()
        await stage.pilot.press("end", "enter")
        await stage.until(lambda: "notes.md 34 tokens" in stage.text())
        assert stage.app.screen is stage.screen


async def test_a_document_read_before_the_model_is_counted_after(folder: Path) -> None:
    import threading

    gate, engine = threading.Event(), FakeEngine(["a"])

    def factory(on_event):
        gate.wait(10)
        return engine

    async with staged(engine, ready=False, factory=factory) as stage:
        await stage.send("/file notes.md")
        await stage.until(lambda: "notes.md ✕" in stage.text())
        gate.set()
        await stage.until(lambda: "notes.md 34 tokens" in stage.text())
