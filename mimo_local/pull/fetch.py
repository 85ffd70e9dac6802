"""Brings files in a given order over several connections, and never holds more than a budget.

Ranges are handed out in order, so that the file needed next is always the first to be whole; each
is written, hashed and noted as it comes. Knows files, not what is in them. Called by `run`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from mimo_local.errors import DownloadError, MimoError
from mimo_local.pull.hub import Hub, RemoteFile, Snapshot
from mimo_local.pull.part import Part
from mimo_local.pull.patience import Patience, TransientError
from mimo_local.pull.staging import Staging

CONNECTIONS: Final = 8
BLOCK: Final = 32 << 20
"""Bytes of one request."""
NOTE: Final = 16 << 20
"""Bytes after which a range is made durable and noted: what a kill can cost per connection."""
NOTE_S: Final = 10.0
"""Seconds after which it is, if so many bytes take longer."""


class RateLimit:
    """Lets bytes pass at most at a rate, all connections together."""

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._free = 0.0
        self._lock = threading.Lock()

    def pause(self, nbytes: int) -> float:
        """Seconds to wait before these bytes count as passed."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            self._free = max(self._free, now) + nbytes / self._rate
            return self._free - now


class _StoppedError(Exception):
    """The work is being ended; nothing went wrong here."""


class _WholeError(Exception):
    """The server ignores ranges: the file has to come in one piece."""


class Fetcher:
    """Threads that fetch; `wait` for files, `release` them when they are no longer needed."""

    def __init__(
        self,
        hub: Hub,
        snapshot: Snapshot,
        staging: Staging,
        *,
        connections: int = CONNECTIONS,
        rate: float | None = None,
        block: int = BLOCK,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._hub, self._snapshot, self.staging = hub, snapshot, staging
        self._connections = connections
        self._block = block
        self._on_note = on_note
        self._limit = RateLimit(rate)
        self._cond = threading.Condition()
        self._stop = threading.Event()
        self._coming: list[RemoteFile] = []
        self._blocks: list[tuple[Part, int, int]] = []
        self._parts: dict[str, Part] = {}
        self._whole: set[str] = set()
        self._again: set[str] = set()
        self._proving: set[str] = set()
        self._ready: set[str] = set()
        self._urgent: set[str] = set()
        self._error: BaseException | None = None
        self.trouble = ""
        """What is being waited for, while nothing comes."""
        self._held = self._budget = self._landed = 0
        self._threads: list[threading.Thread] = []

    def start(self, files: Iterable[RemoteFile], budget: int) -> None:
        """Begin with these files; `budget`: bytes of them that may be here at a time."""
        with self._cond:
            self._budget = self._held + budget
            for file in files:
                if self.staging.here(file):
                    self._ready.add(file.name)
                    self._held += file.size
                    self._landed += file.size
                else:
                    self._coming.append(file)
            self._cond.notify_all()
        while len(self._threads) < self._connections:
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self, names: Iterable[str], tick: Callable[[], None], seconds: float = 0.2) -> None:
        """Return when these files are here; raises what went wrong. `tick` is called meanwhile."""
        wanted = set(names)
        while True:
            with self._cond:
                if self._error is not None:
                    raise self._error
                if wanted <= self._ready:
                    self._urgent = set()
                    return
                if self._urgent != wanted:
                    self._urgent = wanted
                    self._cond.notify_all()
                self._cond.wait(seconds)
            tick()

    def release(self, file: RemoteFile) -> None:
        """The file was taken away: its bytes make room."""
        with self._cond:
            if file.name in self._ready:
                self._ready.discard(file.name)
                self._held -= file.size
            self._cond.notify_all()

    @property
    def fetched(self) -> int:
        """Bytes that came, of files taken away since too."""
        with self._cond:
            return self._landed + sum(part.covered for part in self._parts.values())

    def close(self) -> None:
        """Stop; what came is noted for the next run."""
        self._stop.set()
        with self._cond:
            self._cond.notify_all()
        end = time.monotonic() + 3
        for thread in self._threads:
            thread.join(timeout=max(0, end - time.monotonic()))  # a silent one is left to itself
        with suppress(Exception):
            self._hub.close()
        for part in self._parts.values():
            part.close()

    def _work(self) -> None:
        try:
            while (task := self._take()) is not None:
                try:
                    self._fetch(*task)
                except _WholeError:
                    self._take_whole(task[0])
        except _StoppedError:
            pass
        except BaseException as error:
            with self._cond:
                if not self._stop.is_set():
                    self._error = self._error or error
                self._stop.set()
                self._cond.notify_all()

    def _take(self) -> tuple[Part, int, int] | None:
        """The next range in order, when there is room for it; None to stop."""
        with self._cond:
            while not self._stop.is_set():
                if not self._blocks and self._coming:
                    self._open(self._coming.pop(0))
                    continue
                if self._blocks:
                    part, start, stop = self._blocks[0]
                    # What is waited for must come, whatever else an earlier run left here.
                    fits = self._held + stop - start <= self._budget
                    if fits or part.file.name in self._urgent:
                        self._held += stop - start
                        return self._blocks.pop(0)
                self._cond.wait()
        return None

    def _open(self, file: RemoteFile) -> None:
        part = Part(self.staging, file)
        self._parts[file.name] = part
        self._held += part.covered
        self._blocks += self._cut(part)
        if not part.missing():
            self._blocks.append((part, file.size, file.size))  # only its checksum is left to do

    def _cut(self, part: Part) -> list[tuple[Part, int, int]]:
        step = self._block
        return [
            (part, at, min(at + step, stop))
            for start, stop in part.missing()
            for at in range(start, stop, step)
        ]

    def _fetch(self, part: Part, start: int, stop: int) -> None:
        """One range, tried again from where it broke off; the last one of a file proves it."""
        patience = Patience(self._pause)
        while start < stop:
            at = start
            try:
                start = self._stream(part, start, stop, patience)
            except TransientError as failure:
                start = max(at, self._reached(part, at, stop))
                self.trouble = str(failure)
                patience.again(failure, part.file.name)
        part.hash_on()
        self._complete(part)

    def _take_whole(self, part: Part) -> None:
        """The server ignores ranges: one connection takes the whole file, the others let go."""
        with self._cond:
            if part.file.name not in self._whole:
                self._whole.add(part.file.name)
                mine = [b for b in self._blocks if b[0] is part]
                self._held -= part.file.size - sum(b - a for _, a, b in mine)
                others = [b for b in self._blocks if b[0] is not part]
                self._blocks = [(part, 0, part.file.size), *others]
                self._cond.notify_all()

    def _reached(self, part: Part, start: int, stop: int) -> int:
        gaps = [max(a, start) for a, b in part.missing() if b > start]
        return min([stop, *gaps])

    def _stream(self, part: Part, start: int, stop: int, patience: Patience) -> int:
        """Write what one request brings; returns where it ended."""
        at, noted, then = start, start, time.monotonic()
        whole = part.file.name in self._whole
        try:
            with self._hub.ranged(self._snapshot, part.file, start, stop) as (offset, pieces):
                if offset != start and not whole:
                    raise _WholeError
                for piece in pieces:
                    self._pause(self._limit.pause(len(piece)))
                    skip = max(0, at - offset)
                    data = piece[skip : skip + stop - at]
                    offset += len(piece)
                    if not data:
                        continue
                    part.write(data, at)
                    at += len(data)
                    patience.moved()
                    self.trouble = ""
                    now = time.monotonic()
                    if at - noted >= NOTE or now - then >= NOTE_S:
                        part.note(noted, at)
                        noted, then = at, now
                        part.hash_on()
                    if at >= stop:
                        break
            if at < stop:
                raise TransientError("the connection ended early")
        finally:
            with suppress(OSError, MimoError):
                part.note(noted, at)
        return at

    def _complete(self, part: Part) -> None:
        """Once all of a file is here: prove it, or fetch it once more."""
        name = part.file.name
        with self._cond:
            # A connection that comes late may find the file whole, proven, even used up already.
            if part.missing() or name in self._proving or self._parts.get(name) is not part:
                return
            self._proving.add(name)  # only one thread goes on from here
        if part.proven():
            part.finish()
            with self._cond:
                del self._parts[name]
                self._proving.discard(name)
                self._ready.add(name)
                self._landed += part.file.size
                self._whole.discard(name)
                self._cond.notify_all()
            return
        if name in self._again:
            raise DownloadError(
                f"{name} has the wrong checksum, twice: {part.digest[:16]}..., not "
                f"{part.file.digest[:16]}...",
                hint="the mirror or a proxy in between serves a damaged file; try another network, "
                "or another mirror in HF_ENDPOINT",
            )
        self._on_note(f"{name} came with wrong bytes: fetching it once more")
        part.begin_again()
        with self._cond:
            self._again.add(name)
            self._proving.discard(name)
            self._whole.discard(name)
            self._held -= part.file.size
            self._blocks = self._cut(part) + self._blocks
            self._cond.notify_all()

    def _pause(self, seconds: float) -> None:
        """Wait, unless the work is being ended."""
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise _StoppedError
