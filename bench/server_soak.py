"""A server with many clients that connect, stall, vanish and cancel: does anything of them stay?

    python bench/server_soak.py [-m MODEL] [--clients 200] [--minutes 120] [--round 30] [--seed 1]

The server runs in this process, the clients in another. They come in rounds; after each one all of
them are gone, and threads, asyncio tasks, open files and memory of this process are counted. Before
the first counted round there is one to warm up. Prints a line a round, then one line of JSON; exit
status 1 if threads, tasks or files have grown. A test runs a few seconds of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from mimo_local.errors import MimoError
from mimo_local.server.options import Options
from mimo_local.server.run import Running

CLIENTS = Path(__file__).parent / "server_clients.py"
QUIET_S = 120.0
"""Until all of a round must be gone."""


class Watched(Running):
    """A server in a thread, and how much of everything it has."""

    def __init__(self, options: Options, opener: Callable[..., Any]) -> None:
        super().__init__(options, opener)
        self.process = psutil.Process()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="server")

    def _serve(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Watched:
        self.thread.start()
        while self.service.engine is None:
            if self.error is not None:
                raise self.error
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.thread.join()

    def tasks(self) -> int:
        """Of the server's event loop."""
        found: list[int] = []
        ready = threading.Event()

        def count() -> None:
            found.append(len(asyncio.all_tasks()))
            ready.set()

        loop = self._server.servers[0].get_loop()
        loop.call_soon_threadsafe(count)
        ready.wait()
        return found[0]

    def quiet(self) -> None:
        """Wait until nobody is there any more."""
        end = time.monotonic() + QUIET_S
        state = self._server.server_state
        while state.connections or state.tasks or self.service.active or self.service._feeds:
            if time.monotonic() > end:
                raise RuntimeError(f"{len(state.connections)} connections do not go away")
            time.sleep(0.05)

    def counted(self) -> dict[str, int]:
        """Threads, tasks, open files, bytes."""
        return {
            "threads": threading.active_count(),
            "tasks": self.tasks(),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "rss": self.process.memory_info().rss,
        }


def run(
    opener: Callable[..., Any],
    *,
    n: int,
    seconds: float,
    round_s: float,
    seed: int = 1,
    tokens: int = 200,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Rounds of clients for `seconds`; what happened, and what is left of it."""
    given: dict[str, Any] = {"port": 0, "max_requests": 48, "stall_s": 2.0, "grace_s": 1.0}
    counts: Counter[str] = Counter()
    seen: list[dict[str, int]] = []
    with Watched(Options(**(given | options)), opener) as server:
        port, start, rounds = server.socket.getsockname()[1], time.monotonic(), 0
        while rounds < 2 or time.monotonic() - start < seconds:
            numbers = map(str, (port, n, round_s, seed + rounds, tokens))
            done = subprocess.run(
                [sys.executable, CLIENTS, *numbers], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            counts += Counter(json.loads(done.stdout))
            server.quiet()
            seen.append(server.counted())
            rounds += 1
            now = {**seen[-1], "rss": f"{seen[-1]['rss'] / 1e6:.1f} MB"}
            say(f"{time.monotonic() - start:.0f} s, round {rounds}: {now}")
    first, last = seen[0], seen[-1]
    half = seen[len(seen) // 2]
    return {
        "tool": "bench/server_soak.py",
        "clients": n,
        "seconds": round(time.monotonic() - start, 1),
        "rounds": rounds,
        "counts": dict(sorted(counts.items())),
        **{f"{name}_grown": last[name] - first[name] for name in ("threads", "tasks", "files")},
        "rss_bytes": last["rss"],
        "rss_grown_bytes": last["rss"] - first["rss"],
        # Memory that is lost would show in the second half as in the first.
        "rss_second_half_bytes": last["rss"] - half["rss"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--round", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args(argv)
    from mimo_local.cli import models
    from mimo_local.settings import Settings

    try:
        settings = Settings.resolve(model=args.model)
        found = run(
            lambda tell: models.open_engine(settings, tell), n=args.clients,
            seconds=60 * args.minutes, round_s=args.round, seed=args.seed, tokens=args.tokens,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    grown = {name: found[f"{name}_grown"] for name in ("threads", "tasks", "files")}
    print(f"{found['rounds']} rounds in {found['seconds']} s, grown: {grown}")
    print(json.dumps(found))
    return int(any(n > 0 for n in grown.values()))


if __name__ == "__main__":
    sys.exit(main())
