"""How smoothly the window shows a long answer: tokens/s on the glass, key-press-to-echo, CPU.

The real app in a pilot run with an engine that deals out tokens at a fixed rate; meanwhile keys
are pressed from another thread, so that a blocked window cannot hide its own delay. The last line
of stdout is one JSON document. `python bench/tui_stream.py [--tokens 3000] [--rate 200]`; what is
meant to hold: at least 150 tokens/s shown, 95 of 100 echoes within 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from textual import events

from mimo_local.events import Done, Prefill, Stats, Token
from tui.app import ChatDefaults, MimoApp, calm_memory

SECTION = """\
## Part {n}: what the wind does

The keeper reads the *barometer* every hour and writes **what he sees**, not what he expects; a
line in the log is worth more than a memory. See `log.py` for the form, and [the rules](#rules).

1. Trim the wick at dusk, then every four hours.
2. Wind the clockwork until the spring is hard.
   - never past the mark
   - never by half
3. Write the hour, the wind, the sea.

```python
def watch(hour: int, wind: str) -> str:
    # one line of the log
    return f"{{hour:02d}}:00 {{wind}} all well"
```

| Watch | Wind | Sea      |
|-------|------|----------|
| 18:00 | SW 4 | moderate |
| 22:00 | W 6  | rough    |

> A light that is seen is a promise kept; a light that is late is none.

"""


CODE = "```python\n" + "".join(f"line_{n} = measure({n}, 'wind')\n" for n in range(1500))


def answer(tokens: int, kind: str) -> list[str]:
    """Markdown of every kind in about `tokens` pieces of four characters, as tokens come."""
    text, n = CODE if kind == "code" else "", 1
    while len(text) < 4 * tokens:
        text, n = text + SECTION.format(n=n), n + 1
    text = text[: 4 * tokens]
    return [text[i : i + 4] for i in range(0, len(text), 4)]


class Tokenizer:
    """As little as a chat needs."""

    def token_id(self, text: str) -> None:
        return None

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def render_chat(self, messages: Sequence[dict[str, Any]], **_: Any) -> list[int]:
        return self.encode("\n".join(m["content"] for m in messages))


class Metronome:
    """An engine whose tokens come at `rate` per second, late ones all at once."""

    name, description, context_limit = "metronome", "tokens at a fixed rate", 65536
    config = SimpleNamespace(model_type="metronome")

    def __init__(self, pieces: Sequence[str], rate: float) -> None:
        self.pieces, self.rate, self.tokenizer = pieces, rate, Tokenizer()
        self.began = 0.0

    def new_session(self) -> object:
        return object()

    def submit(self, session: object, ids: Sequence[int], params: object, **_: Any) -> Play:
        return Play(self, len(ids))

    def experts_now(self) -> None:
        return None

    def close(self) -> None:
        pass


class Play:
    """The stream of one answer."""

    def __init__(self, engine: Metronome, prompt: int) -> None:
        self._cancelled = threading.Event()
        self._events = self._run(engine, prompt)

    def cancel(self) -> None:
        self._cancelled.set()

    def __iter__(self) -> Iterator[Any]:
        return self._events

    def _run(self, engine: Metronome, prompt: int) -> Iterator[Any]:
        yield Prefill(prompt, prompt, 1000.0)
        start = engine.began = time.monotonic()
        for n, piece in enumerate(engine.pieces):
            wait = start + n / engine.rate - time.monotonic()
            if wait > 0 and self._cancelled.wait(wait):
                break
            yield Token(1, piece)
        seconds = time.monotonic() - start
        done = len(engine.pieces)
        stats = Stats(prompt, 0, done, 0.1, seconds, prompt + done, engine.context_limit)
        yield Done("stop", stats)


class Fingers(threading.Thread):
    """Presses a key every `every` seconds and notes when the screen that shows it was drawn."""

    def __init__(self, app: MimoApp, loop: asyncio.AbstractEventLoop, every: float) -> None:
        super().__init__(daemon=True)
        self.app, self.loop, self.every = app, loop, every
        self.echoes: list[float] = []
        self.stop = threading.Event()
        self._echoed = threading.Event()
        self._expected = sys.maxsize
        prompt, display = app.chat_screen.prompt, app._display
        render_line = prompt.render_line
        rendered = [0]

        def render(y: int) -> Any:
            rendered[0] = len(prompt.text)
            return render_line(y)

        def shown(*args: Any) -> None:
            display(*args)
            if rendered[0] >= self._expected:
                self._echoed.set()

        prompt.render_line = render  # type: ignore[method-assign]
        app._display = shown  # type: ignore[method-assign]

    def run(self) -> None:
        while not self.stop.wait(self.every):
            self._echoed.clear()
            pressed = time.monotonic()
            self.loop.call_soon_threadsafe(self._press)
            if self._echoed.wait(10):
                self.echoes.append(time.monotonic() - pressed)

    def _press(self) -> None:
        self._expected = len(self.app.chat_screen.prompt.text) + 1
        self.app.post_message(events.Key("a", "a"))


async def measure(tokens: int, rate: float, size: tuple[int, int], kind: str) -> dict[str, Any]:
    """Play one answer and watch."""
    pieces, think = answer(tokens, kind), kind == "thinking"
    if think:
        pieces = ["<think>", *pieces, "</think>", "done"]
    engine = Metronome(pieces, rate)
    app = MimoApp(lambda on_event: engine, ChatDefaults(thinking=think))  # type: ignore[arg-type,return-value]
    async with app.run_test(size=size) as pilot:
        screen = app.chat_screen
        while screen.state != "idle":
            await asyncio.sleep(0.01)
        calm_memory()  # as `tui.app.run` does when the model is loaded
        screen.prompt.put("go")
        await pilot.press("enter")
        while not engine.began:
            await asyncio.sleep(0.005)
        cpu = time.thread_time()
        fingers = Fingers(app, asyncio.get_running_loop(), 0.11)
        fingers.start()
        while screen.state != "idle":
            await asyncio.sleep(0.02)
        ended = asyncio.Event()
        screen.call_after_refresh(ended.set)
        await ended.wait()
        seconds, cpu = time.monotonic() - engine.began, time.thread_time() - cpu
        fingers.stop.set()
        await asyncio.to_thread(fingers.join)
        shown = screen.chat.messages[-1]
        assert (shown.reasoning if think else shown.content).strip()
    app.close()
    echoes = sorted(1000 * e for e in fingers.echoes)
    return {
        "tokens": tokens,
        "offered_tokens_per_s": rate,
        "size": f"{size[0]}x{size[1]}",
        "kind": kind,
        "shown_tokens_per_s": round(tokens / seconds, 1),
        "keys": len(echoes),
        "echo_ms_median": round(statistics.median(echoes), 1),
        "echo_ms_p95": round(echoes[int(0.95 * (len(echoes) - 1))], 1),
        "echo_ms_worst": round(echoes[-1], 1),
        "cpu_share": round(cpu / seconds, 3),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--size", default="120x40")
    kinds = ("mixed", "code", "thinking")
    parser.add_argument("--kind", choices=kinds, default="mixed", help="thinking: left closed")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    print(json.dumps(asyncio.run(measure(args.tokens, args.rate, (width, height), args.kind))))


if __name__ == "__main__":
    main()
