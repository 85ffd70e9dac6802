"""A pull from beginning to end: what is to be done, whether there is room, and doing it.

`Pull.prepare` reads headers and says what it would take; `run` fetches and converts beside each
other, taking every source file away when all layers made of it are safe. Killed at any moment, the
same call goes on. Called by the command line.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mimo_local.errors import DiskSpaceError, DownloadError, MimoError, UsageError
from mimo_local.events import Progress
from mimo_local.pull.fetch import CONNECTIONS, Fetcher
from mimo_local.pull.hub import Hub, RemoteFile, Snapshot
from mimo_local.pull.order import Order, arrange
from mimo_local.pull.remote import Remote, read_remote, stored_config
from mimo_local.pull.staging import Staging
from mimo_local.pull.supply import Supply, steps_of
from mimo_local.sizes import gb
from quant.convert import SPARE, check_target, checked_jobs, convert, finished
from quant.jobs import Job, split
from quant.pack import JOURNAL, Pack
from quant.recipe import Recipe, usual
from quant.writer import MANIFEST

PROBE_S: Final = 1.5
BRANCH: Final = "main"

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What to pull and how; `rate`: most bytes per second."""

    repo: str
    recipe: Recipe
    revision: str | None = None
    keep: bool = False
    connections: int = CONNECTIONS
    rate: float | None = None
    offline: bool = False
    restart: bool = False


@dataclass(slots=True)
class Pull:
    """One pull, prepared: everything that can be known before the first weight comes."""

    options: Options
    target: Path
    staging: Staging
    hub: Hub | None
    remote: Remote
    jobs: list[Job]
    """Those of a layer whose experts lie in several files: one for each of these."""
    order: Order
    """Of what is left to do."""
    resumed: bool
    notes: list[str] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        options: Options,
        target: Path,
        *,
        dry: bool = False,
        on_progress: OnProgress | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> Pull:
        """Find out all about it; unless `dry`, lock the staging folder and pin the commit.

        `on_wait` is told when a server has to be waited for.
        """
        staging = _staging_of(target)
        check_target(staging.folder, target)
        hub, resumed = None if options.offline else Hub(on_wait=on_wait), True
        try:
            if not dry:
                staging.open()
                if options.restart:
                    _clear(staging, target)
            notes: list[str] = []
            known = None if dry and options.restart else staging.pinned()
            resumed = known is not None
            snapshot = _pinned(known, options, staging, hub, notes)
            if not dry and known is None:
                staging.pin(snapshot, options.revision or BRANCH)
            remote = read_remote(snapshot, hub, staging, on_progress)
            whole = checked_jobs(remote.checkpoint, options.recipe)
            jobs = [part for job in whole for part in split(remote.checkpoint, job)]
            done = set() if dry and options.restart else kept(target, jobs)
            order = arrange(steps_of(remote, [job for job in jobs if job.key not in done]),
                            {file.name: file.size for file in remote.shards})  # fmt: skip
            self = cls(options, target, staging, hub, remote, jobs, order, resumed, notes)
            if options.offline:
                self._check_offline()
            return self
        except BaseException:
            if not dry and staging.locked and not resumed:
                staging.clear(everything=True)  # nothing of worth is there yet
            staging.close()
            if hub:
                hub.close()
            raise

    @property
    def to_fetch(self) -> int:
        """Bytes of source that are not here yet."""
        return sum(self.staging.missing(file) for file in self._wanted())

    @property
    def weights_left(self) -> int:
        """Weights that are still to be converted."""
        return sum(step.weight for step in self.order.steps)

    @property
    def pack_bytes(self) -> int:
        """Bytes of the finished pack's weights."""
        return sum(job.nbytes() for job in self.jobs)

    @property
    def pack_left(self) -> int:
        """Bytes of it that are still to be written."""
        left = {step.name for step in self.order.steps}
        return sum(job.nbytes() for job in self.jobs if job.key in left)

    @property
    def source_room(self) -> int:
        """Most bytes of source files on the disk at a time."""
        wanted = sum(file.size for file in self._wanted())
        return wanted if self.options.keep else min(wanted, self.order.budget)

    @property
    def space(self) -> tuple[int, int]:
        """(bytes this still takes of the target's disk at most, bytes free there)."""
        place = next(p for p in (self.target, *self.target.absolute().parents) if p.exists())
        taken = self.pack_left + self.source_room + SPARE
        return max(0, taken - self.staging.nbytes()), shutil.disk_usage(place).free

    def check_space(self) -> None:
        """DiskSpaceError, before the first byte."""
        need, free = self.space
        if free < need:
            raise DiskSpaceError(
                f"the pull needs {gb(need)} more in {self.target.parent}, {gb(free)} are free",
                hint=f"free {gb(need - free)}, or choose a folder on another disk with `--to`",
            )

    def measured_rate(self, seconds: float = PROBE_S) -> float:
        """Bytes per second that come over all connections, measured for a moment."""
        if self.options.rate is not None:
            return self.options.rate
        if self.hub is None:
            return math.inf
        hub, file = self.hub, max(self.remote.shards, key=lambda file: file.size)
        came, begin = [0] * self.options.connections, time.monotonic()

        def probe(i: int) -> None:
            start = file.size * i // len(came)
            with suppress(Exception), hub.ranged(
                self.remote.snapshot, file, start, file.size
            ) as (_, pieces):  # fmt: skip
                for piece in pieces:
                    came[i] += len(piece)
                    if time.monotonic() - begin > seconds:
                        return

        threads = [threading.Thread(target=probe, args=(i,), daemon=True) for i in range(len(came))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 1)
        return sum(came) / max(time.monotonic() - begin, 1e-3)

    def run(self, on_progress: OnProgress | None = None, *, block: int | None = None) -> Pack:
        """Fetch, convert, take away; returns the pack. Whatever is finished is always kept."""
        self.check_space()
        hub = self.hub or Hub()
        more = {} if block is None else {"block": block}
        fetcher = Fetcher(
            hub, self.remote.snapshot, self.staging, connections=self.options.connections,
            rate=self.options.rate, on_note=self.notes.append, **more,
        )  # fmt: skip
        supply = Supply(
            self.remote, self.jobs, fetcher, on_progress, hub=self.hub, keep=self.options.keep
        )
        try:
            for file in (*self.remote.small, *self.remote.shards):
                self.staging.adopt(file)
            fetcher.start(self.remote.small, sum(file.size for file in self.remote.small))
            fetcher.wait((file.name for file in self.remote.small), supply.tick)
            pack = convert(
                self.remote.checkpoint, self.target, self.options.recipe,
                on_progress=supply.converted, supply=supply,
            )  # fmt: skip
        finally:
            fetcher.close()
        self.staging.clear(everything=not self.options.keep)
        self.close()
        return pack

    def discard(self) -> None:
        """Nobody wants it after all: what planning left goes, unless it was there before."""
        if self.staging.locked and not self.resumed:
            self.staging.clear(everything=True)

    def close(self) -> None:
        """Let go of lock and connections."""
        self.staging.close()
        if self.hub:
            self.hub.close()

    def _wanted(self) -> list[RemoteFile]:
        """Files that are left to be fetched or converted."""
        if self.options.keep:
            return [*self.remote.small, *self.remote.shards]
        files = self.remote.snapshot.files
        return [*self.remote.small, *(files[name] for name in self.order.files)]

    def _check_offline(self) -> None:
        lacking = {f.name: n for f in self._wanted() if (n := self.staging.missing(f))}
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            shown = ", ".join(list(lacking)[:3]) + more
            raise DownloadError(
                f"{len(lacking)} files are not all here, {gb(sum(lacking.values()))} are "
                f"missing: {shown}",
                hint="run the same command without --offline, or put them into "
                f"{self.staging.folder}",
            )


def usual_format(repo: str, revision: str | None, places: Iterable[Path], *, offline: bool) -> str:
    """The format to pack a repository in if nobody names one.

    By its config.json: that of a pack or an unfinished pull in `places`, or the hub's;
    DownloadError.
    """
    for place in places:
        with suppress(OSError, ValueError):
            if (place / MANIFEST).exists():
                return usual(dict(json.loads((place / "config.json").read_text("utf-8"))))
        staging = _staging_of(place)
        known = staging.pinned()
        if known is not None and known[0].repo == repo:
            return usual(stored_config(known[0], None, staging))
    if offline:
        return usual({})
    hub = Hub()
    try:
        snapshot = hub.snapshot(repo, revision or BRANCH)
        return usual(stored_config(snapshot, hub, Staging(Path(repo))))
    finally:
        hub.close()


def already_there(target: Path, recipe: Recipe) -> Pack | None:
    """The finished pack in `target`, if there is one; UsageError if it was made otherwise."""
    if not (target / MANIFEST).exists():
        return None
    pack = Pack.open(target)
    if pack.manifest.get("recipe") != recipe.to_json():
        raise UsageError(
            f"{target} already holds a pack in other formats",
            hint="choose another name with `--to`, or delete this one to make it anew",
        )
    (target / JOURNAL).unlink(missing_ok=True)
    _tidy(_staging_of(target))
    return pack


def _staging_of(target: Path) -> Staging:
    return Staging(target.with_name(target.name + ".source"))


def _tidy(staging: Staging) -> None:
    """Remove what a pull left that was killed in its last moment; never a kept source."""
    if staging.state.is_dir():
        with suppress(MimoError):  # another one is still at it
            staging.open()
            staging.clear(everything=not list(staging.folder.glob("*.safetensors")))
            staging.close()


def kept(target: Path, jobs: Iterable[Job]) -> set[str]:
    """Keys of the jobs that an earlier run did; only looks."""
    records = []
    with suppress(OSError):
        for line in (target / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                records += [record] if isinstance(record := json.loads(line), dict) else []
    return set(finished(target, records, jobs))


def _clear(staging: Staging, target: Path) -> None:
    """Begin anew: nothing of an unfinished pull stays, a finished pack does."""
    staging.clear(everything=False)
    for path in staging.folder.iterdir():
        if path.is_file():
            path.unlink()
    if (target / JOURNAL).exists() and not (target / MANIFEST).exists():
        shutil.rmtree(target)


def _pinned(
    known: tuple[Snapshot, str] | None,
    options: Options,
    staging: Staging,
    hub: Hub | None,
    notes: list[str],
) -> Snapshot:
    """The commit to pull: the one an earlier run chose, or what the revision means now."""
    if known is None:
        if hub is None:
            raise DownloadError(
                f"nothing of {options.repo} is here to go on with",
                hint="run the same command once without --offline",
            )
        return hub.snapshot(options.repo, options.revision or BRANCH)
    snapshot, revision = known
    other = options.revision not in (None, revision)
    other = other and not snapshot.commit.startswith(options.revision or "")
    if snapshot.repo != options.repo or other:
        raise UsageError(
            f"{staging.folder} holds an unfinished pull of {snapshot.repo}, "
            f"revision {revision} ({snapshot.commit[:12]})",
            hint="finish that one, choose another name with `--to`, or begin anew with `--restart`",
        )
    notes.append(f"going on with {snapshot.repo} at {snapshot.commit[:12]}")
    if hub is not None:
        now = hub.commit(options.repo, revision)
        if now != snapshot.commit:
            notes.append(
                f"{revision} has moved to {now[:12]} since this pull began; it goes on with "
                f"{snapshot.commit[:12]} (`--restart` begins anew)"
            )
    return snapshot
