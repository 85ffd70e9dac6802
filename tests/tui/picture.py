"""The pictures of the screen: the real app with a canned answer, at a fixed size, theme and clock.

`python tests/tui/picture.py` writes docs/images/chat.svg; test_pictures.py compares it and two more
states. The canned engine names no speed: a picture must not promise one.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    # Started as a script: the tests' folder and the project's are not on the path yet.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fakes import FakeEngine, FakeStream
from textual.pilot import Pilot

from mimo_local import kernels
from mimo_local.events import Stats
from tui import bridge
from tui.app import ChatDefaults, MimoApp

README_PICTURE = Path(__file__).parents[2] / "docs/images/chat.svg"
README_SIZE = (96, 34)

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


def app_for(engine: Canned) -> MimoApp:
    """The app in its own theme, whatever the environment says."""
    app = MimoApp(lambda on_event: engine, ChatDefaults(thinking=True))
    app.theme = "mimo"
    return app


def fixed() -> mock._patch[Any]:
    """Every machine has the same clock: a tenth of a second per piece."""
    ticks = itertools.count()
    real = bridge.Meter
    return mock.patch.object(bridge, "Meter", lambda: real(lambda: next(ticks) / 10))


def same_kernel() -> mock._patch[Any]:
    return mock.patch.object(kernels, "describe", lambda: "avx2")


async def ask(pilot: Pilot[None], question: str) -> None:
    """Ask, wait for the end, and hold the cursor still."""
    app = pilot.app
    assert isinstance(app, MimoApp)
    screen = app.chat_screen
    screen.prompt.cursor_blink = False
    app.animation_level = "none"
    while screen.state != "idle":
        await pilot.pause(0.01)
    screen.prompt.put(question)
    await pilot.press("enter")
    await pilot.pause(0.05)
    while screen.state != "idle":
        await pilot.pause(0.01)
    await pilot.pause(0.2)


async def readme_picture() -> str:
    """The SVG of the README."""
    with fixed(), same_kernel():
        app = app_for(canned(f"<think>{THINKING}</think>", ANSWER))
        async with app.run_test(size=README_SIZE) as pilot:
            await ask(pilot, QUESTION)
            picture = app.export_screenshot(title="mimo chat")
            # Rich names the picture after a checksum that holds addresses of this run.
            picture = re.sub(r"terminal-\d+", "mimo", picture)
            # Trailing space is nothing in a picture, and editors strip it.
            return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


if __name__ == "__main__":
    README_PICTURE.parent.mkdir(parents=True, exist_ok=True)
    README_PICTURE.write_text(asyncio.run(readme_picture()), encoding="utf-8")
    print(README_PICTURE)
