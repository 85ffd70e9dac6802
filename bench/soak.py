"""A mixed load for as long as you like, and how much memory it took beside what was planned.

    python bench/soak.py [-m MODEL] [--ram 300MB] [--minutes 60] [--seed 1]

Chats that go on, are edited and regenerated, long prompts, answers cut off at any moment, by one
engine with experts in tiers. Memory is what this process has beyond its imports; "planned" is
--ram. Prints what happened, then one line of JSON. A test runs 20 seconds of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from mimo_local.engine import Engine, Session
from mimo_local.errors import MimoError
from mimo_local.events import Done, Failed, Token
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

SESSIONS = 3


class Watch:
    """The largest resident memory there was, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.base = self.peak = self.process.memory_info().rss
        self.samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            now = self.process.memory_info().rss
            self.peak = max(self.peak, now)
            self.samples.append(now)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Load:
    """Random requests, repeatable by their seed."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.sessions: list[Session] = [engine.new_session() for _ in range(SESSIONS)]
        self.texts: list[list[int]] = [self.ids(20) for _ in range(SESSIONS)]
        self.counts: Counter[str] = Counter()
        self.disk_bytes = 0

    def ids(self, n: int) -> list[int]:
        return [self.chance.randrange(self.engine.config.vocab_size) for _ in range(n)]

    def one(self) -> None:
        """A request: go on, edit, regenerate, or read something long; some are cut off."""
        i = self.chance.randrange(SESSIONS)
        kind = self.chance.choice(("go on", "go on", "edit", "regenerate", "long"))
        text = self.texts[i]
        if kind == "go on":
            text = text + self.ids(self.chance.randrange(1, 40))
        elif kind == "edit":
            text = text[: self.chance.randrange(1, len(text) + 1)] + self.ids(10)
        elif kind == "long":
            text = self.ids(self.chance.randrange(260, 700))
        if len(text) > min(1200, self.engine.context_limit - 64):
            text = text[:50]
        params = SamplingParams(max_tokens=self.chance.randrange(1, 24), seed=1)
        stream = self.engine.submit(self.sessions[i], text, params)
        cut = self.chance.random() < 0.25
        stop_at = self.chance.randrange(0, 12) if cut else 10**9
        made: list[int] = []
        timer = threading.Timer(self.chance.random() * 0.4, stream.cancel) if cut else None
        if timer is not None:
            timer.start()
        for event in stream:
            match event:
                case Token(id):
                    made.append(id)
                    if len(made) >= stop_at:
                        stream.cancel()
                case Done(reason, stats):
                    self.counts[reason] += 1
                    if stats.experts is not None:
                        self.disk_bytes += stats.experts.disk_bytes
                case Failed(error):
                    raise error
        if timer is not None:
            timer.cancel()
        self.counts[kind] += 1
        self.texts[i] = text + [token for token in made if token >= 0]


def run(model: Path | None, ram: str, seconds: float, seed: int) -> dict[str, Any]:
    """The load for `seconds`; what it did and what memory it took."""
    import bitsandbytes  # noqa: F401  (imports are no part of the plan)
    import torch

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the threads' own memory
    settings = Settings.resolve(model=model, ram=ram)
    if settings.model is None:
        from mimo_local.cli.models import choose

        settings = choose(settings)
    with Watch() as watch, Engine.load(settings) as engine:
        load, start = Load(engine, seed), time.monotonic()
        while time.monotonic() - start < seconds:
            load.one()
        elapsed = time.monotonic() - start
    planned = settings.ram or 0
    grown = watch.peak - watch.base
    third = max(1, len(watch.samples) // 3)
    return {
        "tool": "bench/soak.py",
        "seconds": round(elapsed, 1),
        "requests": sum(load.counts[k] for k in ("go on", "edit", "regenerate", "long")),
        "counts": dict(load.counts),
        "disk_bytes": load.disk_bytes,
        "planned_bytes": planned,
        "peak_bytes": grown,
        "peak_over_planned": round(grown / planned, 4),
        # The last third beside the second: memory that is lost would show.
        "drift_bytes": max(watch.samples[-third:]) - max(watch.samples[third : 2 * third]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--ram", default="300MB")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        found = run(args.model, args.ram, 60 * args.minutes, args.seed)
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(f"{found['requests']} requests in {found['seconds']} s: {found['counts']}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
