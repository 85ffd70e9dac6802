"""Pictures of the screen; `--snapshot-update` and `picture.py` make them anew: look at them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from picture import (
    ANSWER,
    QUESTION,
    README_PICTURE,
    THINKING,
    app_for,
    ask,
    canned,
    fixed,
    readme_picture,
    same_kernel,
)
from textual.pilot import Pilot

from mimo_local.errors import ContextOverflowError
from tui.widgets.answer import Thinking

SMALL = (80, 24)


@pytest.fixture
def same_everywhere() -> Iterator[None]:
    with fixed(), same_kernel():
        yield


def test_an_answer_with_its_thinking_open(snap_compare, same_everywhere: None) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, QUESTION)
        screen = pilot.app.screen
        screen.query_one(Thinking).collapsed = False
        await pilot.pause(0.1)
        screen.query_one("#transcript").scroll_home(animate=False)
        await pilot.pause(0.1)

    engine = canned(f"<think>{THINKING}</think>", ANSWER)
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


def test_an_error_and_the_prompt_back(snap_compare, same_everywhere: None) -> None:
    async def play(pilot: Pilot[None]) -> None:
        await ask(pilot, "Summarise this:\n" + "[bold]a very long document[/bold]")

    error = ContextOverflowError(
        "the prompt has 9,310 tokens, the context holds 8,192",
        hint="shorten it or start with `--context 16384`",
    )
    engine = canned(error=error)
    assert snap_compare(app_for(engine), terminal_size=SMALL, run_before=play)


async def test_the_readme_shows_todays_screen(request: pytest.FixtureRequest) -> None:
    picture = await readme_picture()
    if request.config.getoption("--update-golden"):
        README_PICTURE.write_text(picture, encoding="utf-8")
    assert picture == README_PICTURE.read_text(encoding="utf-8"), "run tests/tui/picture.py"
