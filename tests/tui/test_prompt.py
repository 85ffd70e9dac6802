from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fakes import FakeEngine
from stage import LARGE, Stage, staged

from tui.widgets.prompt import Prompt


@asynccontextmanager
async def prompt() -> AsyncIterator[tuple[Stage, Prompt]]:
    async with staged(FakeEngine(), size=LARGE) as stage:
        yield stage, stage.screen.prompt


async def test_a_line_can_be_broken_in_every_terminal() -> None:
    async with prompt() as (stage, box):
        await stage.pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "\\", "enter", "d")
        assert box.text == "a\nb\nc\nd"
        assert stage.screen.chat.messages == []
        await stage.pilot.press("enter")
        await stage.until(lambda: stage.screen.chat.messages)
        assert stage.screen.chat.messages[0].content == "a\nb\nc\nd"
        assert box.text == ""


async def test_nothing_but_space_is_not_sent() -> None:
    async with prompt() as (stage, box):
        await stage.pilot.press("space", "ctrl+j", "enter")
        assert stage.screen.chat.messages == []
        assert box.text == " \n"


async def test_it_grows_to_eight_lines_and_keeps_the_cursor_in_view() -> None:
    async with prompt() as (stage, box):
        assert box.content_size.height == 1
        heights = []
        for n in (2, 8, 20):
            await stage.type("\n".join(f"line {i}" for i in range(n)))
            heights.append(box.content_size.height)
        assert heights == [2, 8, 8]
        assert "line 19" in stage.text()
        assert "line 3" not in stage.text()


async def test_up_recalls_from_an_empty_prompt_only() -> None:
    async with prompt() as (stage, box):
        for text in ("one", "two\nlines", "/think on"):
            await stage.send(text)
            await stage.until(lambda: not box.text and stage.screen.state == "idle")
        await stage.pilot.press("up")
        assert box.text == "/think on"
        await stage.pilot.press("up")
        assert box.text == "two\nlines"
        await stage.pilot.press("up")  # inside the recalled text first
        assert box.text == "two\nlines"
        await stage.pilot.press("up")
        assert box.text == "one"
        await stage.pilot.press("up")
        assert box.text == "one"
        await stage.pilot.press("down")
        assert box.text == "two\nlines"
        await stage.pilot.press("down")
        assert box.text == "/think on"
        await stage.pilot.press("down")
        assert box.text == ""
        await stage.type("own words")
        await stage.pilot.press("up")
        assert box.text == "own words"


async def test_a_text_that_could_not_be_used_comes_before_the_new_one() -> None:
    async with prompt() as (_, box):
        box.put_back("failed")
        assert box.text == "failed"
        box.put("draft")
        box.put_back("failed")
        assert box.text == "failed\ndraft"


async def test_another_suggestion_is_a_key_away() -> None:
    async with prompt() as (stage, box):
        await stage.pilot.press("/", "s")
        await stage.until(lambda: "⇥ /system TEXT" in stage.text())
        await stage.pilot.press("down")
        await stage.until(lambda: "⇥ /settings" in stage.text())
        await stage.pilot.press("up", "up")
        await stage.until(lambda: "⇥ /stats" in stage.text())
        await stage.pilot.press("tab")
        assert box.text == "/stats"
