"""Feeds a conversion: waits for its files, takes them away when used up, says how far all is.

Knows which source files each file of the pack is made of. Called by `run` and, through
`quant.convert`, by the conversion.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mimo_local.errors import DownloadError
from mimo_local.events import Progress
from mimo_local.pull.fetch import Fetcher
from mimo_local.pull.hub import Hub
from mimo_local.pull.order import Step, arrange
from mimo_local.pull.remote import Remote
from quant.inventory import layer_of
from quant.jobs import Job

WINDOW_S: Final = 60.0
"""Seconds the rate is taken from: a layer comes and is converted in about that time."""

OnProgress = Callable[[Progress], None]


def steps_of(remote: Remote, jobs: Iterable[Job]) -> list[Step]:
    """The jobs with the source files they need and their weights."""
    checkpoint = remote.checkpoint
    steps = []
    for job in jobs:
        names = list(job.names())
        weight = sum(math.prod(checkpoint.shape(name)) for name in names)
        steps.append(Step(job.key, frozenset(checkpoint.files_of(names)), weight))
    return steps


class Supply:
    """Gives the conversion its files as they land and takes them away when they are used up."""

    def __init__(
        self,
        remote: Remote,
        jobs: Sequence[Job],
        fetcher: Fetcher,
        on_progress: OnProgress | None,
        *,
        hub: Hub | None,
        keep: bool,
    ) -> None:
        """`keep`: no file is taken away, and all of them are fetched."""
        self.identity = f"{remote.snapshot.repo}@{remote.snapshot.commit}"
        self._remote, self._fetcher, self._hub, self._keep = remote, fetcher, hub, keep
        self._staging = fetcher.staging
        self._files = remote.snapshot.files
        self._sizes = {file.name: file.size for file in remote.shards}
        self._steps = {step.name: step for step in steps_of(remote, jobs)}
        self._uses: dict[str, int] = {}
        self._left: set[str] = set()
        self._gone = -sum(file.size for file in remote.small)  # fetched too, but no weights
        self._meter = Meter(sum(self._sizes.values()), on_progress)
        self._stage = "fetching"
        self._share = 0.0

    def order(self, jobs: list[Job], done: Iterable[str]) -> list[Job]:
        """Begin to fetch what the jobs not done need; jobs in the order it comes."""
        done = set(done)
        left = [self._steps[job.key] for job in jobs if job.key not in done]
        self._left = {step.name for step in left}
        order = arrange(left, self._sizes)
        for step in left:
            for name in step.needs:
                self._uses[name] = self._uses.get(name, 0) + 1
        rest = [name for name in self._sizes if name not in self._uses]
        keep = self._keep
        if not keep:
            for name in rest:
                self._staging.drop(self._files[name])
            self._sample(rest)
            self._gone += sum(self._sizes[name] for name in rest)
        coming = [*order.files, *(rest if keep else [])]
        budget = sum(self._sizes.values()) if keep else order.budget
        self._fetcher.start((self._files[name] for name in coming), budget)
        if not left:
            self._fetch_rest()
        place = {step.name: i for i, step in enumerate(order.steps)}
        return sorted(jobs, key=lambda job: place.get(job.key, -1))

    def need(self, job: Job) -> None:
        """Wait for the job's files."""
        self._stage = f"fetching {_what(job)}"
        self._fetcher.wait(self._steps[job.key].needs, self.tick)

    def done(self, job: Job) -> None:
        """Take away what no other job needs."""
        if job.key not in self._left:
            return
        self._left.discard(job.key)
        for name in self._steps[job.key].needs:
            self._uses[name] -= 1
            if self._uses[name] == 0 and not self._keep:
                self._staging.drop(self._files[name])
                self._fetcher.release(self._files[name])
        if not self._left:
            self._fetch_rest()

    def _fetch_rest(self) -> None:
        """Files that are only to be kept."""
        if self._keep:
            self._stage = "fetching the rest"
            self._fetcher.wait(self._sizes, self.tick)

    def converted(self, event: Progress) -> None:
        """The conversion's own progress, as a share of the whole."""
        self._share = event.done / max(event.total, 1)
        self._stage = event.stage
        self.tick()

    def tick(self) -> None:
        """Say how far everything is: a byte counts half when it is here, half when converted."""
        total = self._meter.total
        fetched = min(total, max(0, self._gone + self._fetcher.fetched))
        trouble = self._fetcher.trouble if self._stage.startswith("fetching") else ""
        stage = f"{self._stage} (trying again: {trouble})" if trouble else self._stage
        self._meter.tell(stage, round((fetched + self._share * total) / 2))

    def _sample(self, names: Iterable[str]) -> None:
        """Of files nothing is made of, what the fingerprint looks at is enough."""
        hub, remote = self._hub, self._remote
        for file in remote.checkpoint.files():
            name = file.path.name
            if name not in names or self._staging.kept(f"{name}.samples") is not None:
                continue
            if hub is None:
                raise DownloadError(
                    f"{name} is not here", hint="run the same command once without --offline"
                )
            pieces = (hub.read(remote.snapshot, self._files[name], *r) for r in file.samples())
            self._staging.keep(f"{name}.samples", b"".join(pieces))


class Meter:
    """Bytes done, never fewer than before, and the time left by the rate of the last minute."""

    def __init__(
        self,
        total: int,
        on_progress: OnProgress | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._on_progress = on_progress
        self._clock = clock
        self._done = 0
        self._marks: deque[tuple[float, int]] = deque()

    def tell(self, stage: str, done: int) -> None:
        """Report, with the time left as soon as there is a rate."""
        now = self._clock()
        self._done = min(self.total, max(self._done, done))
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_S:
            self._marks.popleft()
        since, base = self._marks[0]
        moved, took = self._done - base, now - since
        eta = (self.total - self._done) * took / moved if moved > 0 and took > 2 else None
        if self._on_progress:
            self._on_progress(Progress(stage, self._done, self.total, eta_s=eta))


def _what(job: Job) -> str:
    """What a job makes, in a word or two."""
    name = next(iter(job.names()))
    layer = layer_of(name)
    if layer is not None:
        return f"layer {layer}"
    return "MTP layers" if ".mtp." in name else "embedding and head"
