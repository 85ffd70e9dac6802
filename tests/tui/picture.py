"""The pictures of the screen: the real app with a canned answer, at a fixed size, theme and clock.

`python tests/tui/picture.py` writes docs/images/*.svg; test_pictures.py compares them and a picture
of every other screen. The canned engine names no speed: a picture must not promise one.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    # Started as a script: the tests' folder and the project's are not on the path yet.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fakes import FakeEngine, FakeStream
from textual.pilot import Pilot

from mimo_local import kernels
from mimo_local.chat import Message
from mimo_local.events import Stats
from mimo_local.history import History
from tui import bridge, machine
from tui.app import ChatDefaults, MimoApp
from tui.messages import Machine
from tui.pacing import Meter
from tui.widgets import chats
from tui.widgets.chats import ChatOptions
from tui.widgets.meters import Meters

IMAGES = Path(__file__).parents[2] / "docs/images"
README_SIZE = (96, 34)
LIST_SIZE = (120, 34)

QUESTION = "How does a lighthouse keeper spend the night? Please as a short plan."
THINKING = "A plan in three steps, then the watch as a table.\nA line of code would be nice."
ANSWER = """\
A night on the lamp has **three parts**:

1. *Light it* at dusk and trim the wick every four hours.
2. *Wind the clockwork* that turns the lens.
3. *Write the log* before the next watch.

| Watch | What                |
|-------|---------------------|
| 18:00 | light, first trim   |
| 22:00 | wind, read the wind |

```python
watches = [f"{hour:02d}:00 all well" for hour in range(18, 24, 4)]
```
"""


class Canned(FakeEngine):
    """Plays an answer at once and reports no times."""

    name = "smollm2-135m-swa-int8-v1"
    description = "demo model, 30 layers, 16 experts, 0.24 GB, int8"

    def submit(self, *args: Any, **kwargs: Any) -> FakeStream:
        stream = super().submit(*args, **kwargs)
        stream._stats = lambda prompt, completion: Stats(  # type: ignore[method-assign]
            prompt_tokens=61,
            completion_tokens=completion,
            context_used=61 + completion,
            context_limit=self.context_limit,
            kernel="avx2",
        )
        return stream


def canned(*pieces: str, **answer: Any) -> Canned:
    """An engine with one answer, cut into pieces of four characters."""
    engine = Canned(context_limit=8192)
    text = "".join(pieces)
    engine.queue(*[text[i : i + 4] for i in range(0, len(text), 4)], **answer)
    return engine


def app_for(engine: Canned, history: Path | None = None) -> MimoApp:
    """The app in its own theme, whatever the environment says."""
    app = MimoApp(
        lambda on_event: engine,
        ChatDefaults(thinking=True),
        open_history=None if history is None else lambda: History.open(history),
    )
    app.theme = "mimo"
    return app


CHATS = (
    ("Contract with the port authority", "Which clauses end it early?", "Three: 4.2, 7 and 11."),
    ("Translate the keeper's log", "Into English, please.", "20:00, the lamp is lit."),
    ("Why do the tides lag?", "Why do the tides lag?", "Friction holds the water back."),
    ("A script for the barometer", "Read it every hour.", "A timer, then a line in the log."),
)


def make_history(path: Path) -> Path:
    """Some chats a keeper of lights might have had."""
    with History.open(path) as history:
        for title, question, reply in CHATS:
            chat = history.new_chat(title=title)
            asked = history.add(chat, Message("user", question), parent=None)
            history.add(chat, Message("assistant", reply), parent=asked)
    return path


MACHINE = Machine(1_320_000_000, 7_900_000_000, 16_800_000_000)
"""Of the demo model on a small machine."""


@contextmanager
def same_everywhere() -> Iterator[None]:
    """Every machine has the same clock (a tenth of a second per piece), kernel and memory."""
    ticks = itertools.count()
    with (
        mock.patch.object(bridge, "Meter", lambda: Meter(lambda: next(ticks) / 10)),
        mock.patch.object(kernels, "describe", lambda: "avx2"),
        mock.patch.object(machine.Gauge, "read", lambda self: MACHINE),
        mock.patch.object(chats, "ago", lambda seconds: "3 h ago"),
    ):
        yield


async def ask(pilot: Pilot[None], question: str) -> None:
    """Ask, wait for the end, and hold the cursor still."""
    app = pilot.app
    assert isinstance(app, MimoApp)
    screen = app.chat_screen
    screen.prompt.cursor_blink = False
    app.animation_level = "none"
    while screen.state != "idle" or screen.query_one(Meters).machine is None:
        await pilot.pause(0.01)
    screen.prompt.put(question)
    await pilot.press("enter")
    await pilot.pause(0.05)
    while screen.state != "idle":
        await pilot.pause(0.01)
    await pilot.pause(0.2)


async def settle(pilot: Pilot[None], found: Callable[[], object]) -> None:
    """Wait for something, then for its drawing."""
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.02)
    await pilot.pause(0.1)


def export(app: MimoApp) -> str:
    """The SVG of what is on the glass now."""
    picture = app.export_screenshot(title="mimo chat")
    # Rich names the picture after a checksum that holds addresses of this run.
    picture = re.sub(r"terminal-\d+", "mimo", picture)
    # Trailing space is nothing in a picture, and editors strip it.
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


async def chat_picture() -> str:
    """A chat with its meters."""
    with same_everywhere():
        app = app_for(canned(f"<think>{THINKING}</think>", ANSWER))
        async with app.run_test(size=README_SIZE) as pilot:
            await ask(pilot, QUESTION)
            return export(app)


async def list_picture() -> str:
    """The list of chats beside a chat with two branches."""
    with same_everywhere(), tempfile.TemporaryDirectory() as folder:
        engine = canned("By the clock: trim, wind, write.")
        engine.queue(f"<think>{THINKING}</think>", ANSWER)
        app = app_for(engine, make_history(Path(folder) / "history.db"))
        async with app.run_test(size=LIST_SIZE) as pilot:
            await ask(pilot, QUESTION)
            await ask(pilot, "/regen")
            await pilot.press("f2")
            options = app.screen.query_one(ChatOptions)
            await settle(pilot, lambda: len(options.rows) == 5)
            await pilot.press("down")
            await pilot.pause(0.2)
            picture = export(app)
        app.close()
        return picture


PICTURES = {"chat.svg": chat_picture, "chats.svg": list_picture}

if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        (IMAGES / name).write_text(asyncio.run(make()), encoding="utf-8")
        print(IMAGES / name)
