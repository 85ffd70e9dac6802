"""Idle conversations kept for whoever continues them: the longest known beginning is found, copied.

A request brings ids and no name of a chat: `take` gives the session that has processed most of
them, as a copy where other people's words would be lost otherwise. Not for several threads: only
the engine's thread calls it. What rested for a while lies on disk too (`session_files`): a chat may
go on after a restart, or after it made room for others. Knows no text and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mimo_local.errors import PackError
from mimo_local.session import MAX_SNAPSHOTS, Session

if TYPE_CHECKING:
    from mimo_local.cache import KVCache
    from mimo_local.session_files import SessionFiles

LEAST: Final = 32
"""Ids worth keeping or looking for: fewer are read in one step."""
FORK_FROM: Final = 64
"""Ids of another branch that may be lost: they are read again as fast as a copy is made."""
COPY_RATIO: Final = 32
"""Rows copied or loaded in the time of one that is made, at least: 23 kB against 15 B weights."""
LOAD_FROM: Final = 256
"""Ids that a file must save the reading of."""
SAVE_FROM: Final = 256
"""New ids that are worth a save: a restart point takes as many bytes as 1100 rows."""
CLOSE_S: Final = 10.0
"""Seconds of saving that somebody who ends the program waits for, at most."""


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """What a pool holds, for meters: numbers of sessions, bytes of memory."""

    idle: int
    taken: int
    nbytes: int
    budget: int
    saves: int = 0
    """Saved and loaded since the start."""
    loads: int = 0
    trouble: str = ""
    """Why sessions are not saved, if they are not."""


class SessionPool:
    """Sessions that are answering and sessions at rest, within one budget of bytes.

    `budget` is for both: what the plan has for keys and values of one context, and for its restart
    points, is all there is, so idle sessions have what the running ones leave and go, the longest
    unused first, when these need it. The plan's figure stays the most that is ever taken, unless
    requests that do not fit together are run together (`fits`).
    """

    def __init__(
        self,
        new_cache: Callable[[], KVCache],
        *,
        budget: int,
        files: SessionFiles | None = None,
        most: int = 32,
    ) -> None:
        """`files`: where idle sessions are saved; None: nowhere. `most`: idle ones in memory."""
        self.budget, self.most, self.files = budget, most, files
        self.saves = self.loads = 0
        self._new_cache = new_cache
        self._idle: list[Session] = []  # the longest unused first
        self._taken: dict[Session, int] = {}  # ids each may have at its end
        blank = new_cache()
        self._row_bytes, self._fixed = blank.row_bytes, blank.used_bytes

    # ---- for a request ---------------------------------------------------------------------------

    def take(self, ids: Sequence[int], *, tokens: int = 0) -> Session:
        """A session that holds the longest known beginning of `ids` and nothing else.

        Its last id at least is left to process. `tokens`: how long prompt and answer may become.
        Give it back when the answer is done, whatever became of it.
        """
        session = self._take(list(ids), max(tokens, len(ids)))
        session.foresee(len(ids))
        return session

    def _take(self, ids: list[int], most: int) -> Session:
        source, kept = self._best(ids)
        if (loaded := self._loaded(ids, kept, most)) is not None:
            return self._hand_out(loaded, most)
        if source is None:
            return self._hand_out(Session(self._new_cache), most)
        if self._must_copy(source, ids, kept):
            if self._make_room(self._expected(most), spare=source):
                if source in self._idle:
                    self._touch(source)
                return self._hand_out(self._copy(source, kept), most)
            if source in self._taken:
                return self._hand_out(Session(self._new_cache), most)
            if not self._taken:
                self._keep(source)
        self._idle.remove(source)
        source.rewind(kept)
        return self._hand_out(source, most)

    def fork(self, session: Session) -> Session:
        """Another taken session with what a taken one has for certain: one prompt, many answers.

        That is what its last restart point holds; both are given back in the end.
        """
        return self._hand_out(self._copy(session, len(session.ids)), self._taken[session])

    def fits(self, tokens: int) -> bool:
        """Whether one more session of so many ids fits beside those that are answering."""
        if not self._taken:
            return True
        return self._promised() + self._expected(tokens) <= self.budget

    def give_back(self, session: Session, *, keep: bool = True) -> None:
        """The answer is done, or was cancelled, or failed. `keep`: others may go on from it."""
        del self._taken[session]
        if not keep or len(session.ids) < LEAST:
            return
        if (better := next((s for s in self._idle if _covers(s, session)), None)) is not None:
            self._touch(better)
            return
        self._idle = [other for other in self._idle if not _covers(session, other)]
        session.cache.trim()
        self._idle.append(session)
        while len(self._idle) > self.most:
            self._evict(self._idle[0])
        self._make_room(0)

    # ---- between requests ------------------------------------------------------------------------

    def rest(self, interrupted: Callable[[], bool]) -> bool:
        """Nobody asked for anything for some seconds: save one session, the latest first.

        `interrupted` is asked every 16 MB and ends it at once. False: nothing is left to do, or
        nothing can be done now.
        """
        # One that cannot be saved, being too large, must not keep the others from it.
        return any(
            not interrupted() and self._keep(session, interrupted)
            for session in reversed(self._idle)
            if self._worth_saving(session)
        )

    # ---- what there is ---------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all sessions; copies of rings that forks share count once."""
        return self._bytes([*self._idle, *self._taken])

    @property
    def figures(self) -> PoolFigures:
        """For meters."""
        return PoolFigures(
            len(self._idle), len(self._taken), self.nbytes, self.budget, self.saves, self.loads,
            trouble="" if self.files is None else self.files.trouble,
        )  # fmt: skip

    def close(self) -> None:
        """Save what is worth it, for some seconds at most, and let go of all idle sessions."""
        end = time.monotonic() + CLOSE_S
        while self.rest(lambda: time.monotonic() > end):
            pass
        self._idle.clear()

    # ---- inside ----------------------------------------------------------------------------------

    def _best(self, ids: list[int]) -> tuple[Session | None, int]:
        """Who holds most of `ids`, and of these whose loss would be smallest; None if nobody."""
        found: Session | None = None
        best = (LEAST - 1, 0)
        for session in (*self._idle, *self._taken):
            running = session in self._taken
            lost = len(session.ids) - session.common_prefix(ids)
            rank = session.usable_prefix(ids, running=running), -lost - running
            if rank[0] >= LEAST and rank >= best:
                found, best = session, rank
        return found, best[0] if found is not None else 0

    def _loaded(self, ids: list[int], kept: int, most: int) -> Session | None:
        """A saved session that spares more reading than it takes, beside what memory has."""
        while self.files is not None and (found := self.files.find(ids)) is not None:
            saved, n = found
            if n - kept < max(LOAD_FROM, n // COPY_RATIO):
                return None
            self._make_room(self._expected(most))
            try:
                session = self.files.load(saved, n)
            except PackError:
                continue  # it was removed: perhaps another one will do
            self.loads += 1
            return session
        return None

    def _copy(self, source: Session, n: int) -> Session:
        copy = source.fork(n, running=source in self._taken)
        if self.files is not None:
            self.files.inherit(source, copy)
        return copy

    def _worth_saving(self, session: Session) -> bool:
        return self.files is not None and self.files.unsaved(session) >= SAVE_FROM

    def _keep(self, session: Session, busy: Callable[[], bool] = lambda: False) -> bool:
        """Save a session if that is worth it; whether it was saved."""
        if self.files is None or not self._worth_saving(session):
            return False
        saved = self.files.save(session, busy)
        self.saves += saved
        return saved

    def _must_copy(self, source: Session, ids: list[int], kept: int) -> bool:
        if source in self._taken:
            return True
        lost = len(source.ids) - source.common_prefix(ids)
        return lost > max(FORK_FROM, kept // COPY_RATIO)

    def _hand_out(self, session: Session, tokens: int) -> Session:
        self._make_room(self._expected(tokens, session))
        self._taken[session] = tokens
        return session

    def _touch(self, session: Session) -> None:
        self._idle.remove(session)
        self._idle.append(session)

    def _expected(self, tokens: int, session: Session | None = None) -> int:
        """Bytes a session will have when it holds so many ids: two more restart points."""
        points = () if session is None else session.points
        one = points[0].nbytes if points else self._fixed
        size = self._fixed + min(len(points) + 2, MAX_SNAPSHOTS) * one + tokens * self._row_bytes
        return size if session is None else max(size, session.cache.used_bytes)

    def _promised(self) -> int:
        return sum(self._expected(tokens, session) for session, tokens in self._taken.items())

    def _make_room(self, need: int, *, spare: Session | None = None) -> bool:
        """Evict until `need` more bytes fit; False: they do not, or `spare` would have to go."""
        while self._bytes(self._idle) + self._promised() + need > self.budget:
            if not self._idle or self._idle[0] is spare:
                return False
            self._evict(self._idle[0])
        return True

    def _evict(self, session: Session) -> None:
        """Let one go; on disk first, unless somebody is answering and may need that disk."""
        if not self._taken:
            self._keep(session)
        self._idle.remove(session)

    @staticmethod
    def _bytes(sessions: Sequence[Session]) -> int:
        points = {id(p.rings): p.nbytes for s in sessions for p in s.points}
        return sum(s.cache.used_bytes for s in sessions) + sum(points.values())


def _covers(session: Session, other: Session) -> bool:
    """Whether whoever would continue `other` is as well served by `session`."""
    n = len(other.ids)
    return session.ids[:n] == other.ids and session.usable_prefix([*other.ids, -1]) == n
