"""Puts the app on a stage: a fake engine, a fixed size, and waiting for what should happen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes import FakeEngine, FakeStream
from textual.pilot import Pilot

from mimo_local.events import Done, Event, Failed, Prefill, Progress, Stats, Token
from mimo_local.history import History
from tui.app import ChatDefaults, MimoApp
from tui.screens.chat import ChatScreen
from tui.widgets.transcript import ErrorBox, Transcript

SMALL, LARGE = (80, 24), (120, 40)


class Stage:
    """The running app and what a test wants from it."""

    def __init__(self, app: MimoApp, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def screen(self) -> ChatScreen:
        return self.app.chat_screen

    @property
    def transcript(self) -> Transcript:
        return self.screen.query_one(Transcript)

    def text(self) -> str:
        """What is on the glass, line by line."""
        width, height = self.app.size
        lines = self.app.screen._compositor.render_strips()  # what export_screenshot draws
        return "\n".join("".join(s.text for s in strip).rstrip() for strip in lines)[
            : (width + 1) * height
        ]

    async def until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Wait until `condition()` is true."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited {timeout_s} s; the screen:\n{self.text()}"
            await asyncio.sleep(0.03)  # pilot.pause waits up to 1 s for an idle CPU
        await self.pilot.pause()

    async def idle(self) -> None:
        await self.until(lambda: self.screen.state == "idle")

    async def type(self, text: str) -> None:
        """Put text in the prompt as a paste would."""
        self.screen.prompt.focus()
        self.screen.prompt.put(text)
        await self.pilot.pause()

    async def send(self, text: str) -> None:
        await self.type(text)
        await self.pilot.press("enter")

    async def ask(self, text: str) -> None:
        """Send and wait until there is an answer or an error."""
        said, failed = len(self.screen.chat.messages), len(self.screen.query(ErrorBox))
        await self.send(text)
        await self.until(
            lambda: (
                self.screen.state == "idle"
                and (
                    len(self.screen.chat.messages) == said + 2
                    or len(self.screen.query(ErrorBox)) > failed
                )
            )
        )


@asynccontextmanager
async def staged(
    engine: FakeEngine,
    *,
    size: tuple[int, int] = SMALL,
    defaults: ChatDefaults | None = None,
    ready: bool = True,
    factory: Callable[[Callable[[Progress], None]], Any] | None = None,
    history: Path | None = None,
    resume: int | None = None,
) -> AsyncIterator[Stage]:
    """The app with `engine`, at `size`; waits for the engine unless `ready` is False."""
    app = MimoApp(
        factory or (lambda on_event: engine),
        replace(defaults or ChatDefaults(), chat_id=resume),
        open_history=None if history is None else lambda: History.open(history),
    )
    try:
        async with app.run_test(size=size, notifications=True) as pilot:
            stage = Stage(app, pilot)
            if ready:
                await stage.idle()
            yield stage
    finally:
        await asyncio.to_thread(app.close)


class Gated(FakeEngine):
    """Stops after `at` tokens of each answer until `gate` is set; at the end if `at` is None."""

    def __init__(self, *answers: Sequence[str], at: int | None = None, **kwargs: Any) -> None:
        super().__init__(*answers, **kwargs)
        self.at, self.gate = at, threading.Event()

    def submit(self, *args: Any, **kwargs: Any) -> FakeStream:
        stream = super().submit(*args, **kwargs)
        inner = stream._events

        def play() -> Iterator[Event]:
            tokens = 0
            for event in inner:
                tokens += isinstance(event, Token)
                if tokens == self.at or isinstance(event, Done | Failed):
                    self.gate.wait(10)
                yield event

        stream._events = play()
        return stream


class SlowReader(FakeEngine):
    """Reports prefill for ever, until somebody cancels: a long document being read."""

    def submit(self, *args: Any, **kwargs: Any) -> FakeStream:
        stream = super().submit(*args, **kwargs)
        cancelled = threading.Event()

        def play() -> Iterator[Event]:
            done = 0
            while not cancelled.wait(0.01):
                done = min(done + 100, 9_000)
                yield Prefill(done, 10_000, 100.0)
            yield Done("cancelled", Stats(prompt_tokens=10_000, context_used=done))

        stream._events = play()
        stream.cancel = cancelled.set  # type: ignore[method-assign]
        return stream


def chunks(text: str, n: int = 4) -> list[str]:
    """Text in pieces of n characters, as tokens would come."""
    return [text[i : i + n] for i in range(0, len(text), n)]
