"""A mixed load for as long as you like, and how much memory it took beside what was planned.

    python bench/soak.py [-m MODEL] [--ram 300MB] [--context 4096] [--minutes 60] [--clients 3]

Chats that go on, are edited, regenerated and begun anew, prompts of every length up to the context,
answers cut off at any moment, several at once, by one engine with experts in tiers. Memory is what
this process has beyond its imports; "planned" is what the planner says the model takes. Prints a
line a minute, what happened, then one line of JSON. A test runs a few seconds of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mimo_local.engine import Engine
from mimo_local.errors import MimoError
from mimo_local.events import Done, Failed, Token
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

LEAST = 16
"""Requests, however slow the machine is."""
LONGEST = 24
"""Tokens of an answer, at most."""
KINDS = ("go on", "go on", "go on", "edit", "regenerate", "anew", "long")


class Watch:
    """The largest resident memory there was, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.base = self.peak = self.process.memory_info().rss
        self.samples: list[int] = []
        """The largest of each second."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        most, looks = 0, 0
        while not self._stop.wait(0.01):
            most, looks = max(most, self.process.memory_info().rss), looks + 1
            self.peak = max(self.peak, most)
            if looks == 100:
                self.samples.append(most)
                most = looks = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Load:
    """Random requests of one client; what they are is repeatable by the seed, not their timing."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.text = self.ids(20)
        self.most = engine.context_limit - LONGEST
        """Longest prompt."""
        self.counts: Counter[str] = Counter()
        self.disk_bytes = self.done = 0

    def go_on(self, until: float) -> None:
        """Requests until then, LEAST of them at least."""
        while time.time() < until or self.done < LEAST:
            self.one()

    def ids(self, n: int) -> list[int]:
        return [self.chance.randrange(self.engine.config.vocab_size) for _ in range(n)]

    def prompt(self) -> list[int]:
        """Go on, edit, regenerate, begin anew, or read something long: any length alike."""
        kind = self.chance.choice(KINDS)
        self.counts[kind] += 1
        if kind == "go on":
            text = self.text + self.ids(self.chance.randrange(1, 40))
        elif kind == "edit":
            text = self.text[: self.chance.randrange(1, len(self.text) + 1)] + self.ids(10)
        elif kind == "long":
            low, high = math.log(min(260, self.most)), math.log(self.most + 1)
            text = self.ids(int(math.exp(self.chance.uniform(low, high))))
        else:
            text = self.text if kind == "regenerate" else self.ids(20)
        return text if len(text) <= self.most else text[:50]

    def one(self, prompt: list[int] | None = None, *, whole: bool = False) -> None:
        """A request, `prompt` or a random one; a quarter of them are cut off, `whole` ones not."""
        self.text = self.prompt() if prompt is None else prompt
        params = SamplingParams(max_tokens=self.chance.randrange(1, LONGEST), seed=1)
        stream = self.engine.submit(None, self.text, params)
        cut = not whole and self.chance.random() < 0.25
        stop_at = self.chance.randrange(0, 12) if cut else LONGEST
        timer = threading.Timer(self.chance.random() * 0.4, stream.cancel)
        if cut:
            timer.start()
        made: list[int] = []
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
        timer.cancel()
        self.text += [token for token in made if token >= 0]
        self.done += 1


@dataclass
class Loaded:
    """An engine and what its plan says."""

    engine: Engine
    planned: int
    """Bytes of RAM the model takes."""
    buffers: int
    """Of these, what comes after loading: experts, keys and values, activations, hidden states."""


def load(settings: Settings) -> Loaded:
    """The engine as `Engine.load` makes it; MimoError where there is no plan."""
    from mimo_local import loading

    found = loading.load(settings)
    if found.plan is None:
        raise MimoError("a checkpoint has no tiers", hint="give a pack, see `mimo quantize`")
    engine = Engine(
        found.model,
        name=found.name,
        description=found.description,
        context_limit=found.context_limit,
        new_cache=found.new_cache,
        session_bytes=found.session_bytes,
    )
    made = found.plan
    return Loaded(engine, made.ram_bytes, made.expert_ram_bytes + made.spare_bytes)


def run(
    settings: Settings,
    seconds: float,
    seed: int,
    clients: int = 3,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The load for `seconds`; what it did and what memory it took."""
    import bitsandbytes  # noqa: F401  (imports are no part of the plan)
    import torch

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the threads' own memory
    with Watch() as watch:
        found = load(settings)
        with found.engine as engine:
            loaded = watch.process.memory_info().rss
            loads, start, minute = [Load(engine, seed + i) for i in range(clients)], time.time(), 0
            # As long as the plan has room for.
            loads[0].one(loads[0].ids(loads[0].most), whole=True)
            with ThreadPoolExecutor(clients) as pool:
                work = [pool.submit(load.go_on, start + seconds) for load in loads]
                while wait(work, timeout=1.0).not_done:
                    if (elapsed := time.time() - start) >= 60 * minute:
                        share = (watch.peak - watch.base) / found.planned
                        done = sum(load.done for load in loads)
                        say(f"{elapsed / 60:.0f} min, {done} requests: {share:.3f} of the plan")
                        minute = int(elapsed / 60) + 1
                for each in work:
                    each.result()
            elapsed, done = time.time() - start, sum(load.done for load in loads)
    grown, third = watch.peak - watch.base, max(1, len(watch.samples) // 3)
    return {
        "tool": "bench/soak.py",
        "seconds": round(elapsed, 1),
        "requests": done,
        "clients": clients,
        "counts": dict(sum((load.counts for load in loads), Counter())),
        # Of requests that ran at once, what one read is counted for the others too.
        "disk_bytes": sum(load.disk_bytes for load in loads),
        "planned_bytes": found.planned,
        "peak_bytes": grown,
        "peak_over_planned": round(grown / found.planned, 4),
        # The same without what loading takes: a small model's is less than this program's.
        "buffers_over_planned": round((watch.peak - loaded) / found.buffers, 4),
        # The last third beside the second: memory that is lost would show.
        "drift_bytes": max(watch.samples[-third:]) - max(watch.samples[third : 2 * third]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--ram", default="300MB")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        settings = Settings.resolve(model=args.model, ram=args.ram, context=args.context)
        if settings.model is None:
            from mimo_local.cli.models import choose

            settings = choose(settings)
        found = run(
            settings, 60 * args.minutes, args.seed, args.clients,
            lambda text: print(text, flush=True),
        )  # fmt: skip
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(f"{found['requests']} requests in {found['seconds']} s: {found['counts']}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
