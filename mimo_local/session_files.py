"""Sessions to files and back: rows are written once, in pieces, and read into their final place.

What a session has already on disk it keeps there: saving it again writes the rows that came since
and the restart points that are new, and a branch shares its beginning with the others. Knows which
bytes of a cache go where; the folder's rules are `session_store`'s, when to save and what to load
`session_pool`'s. Only the engine's thread calls it: a save asks between chunks whether to stop.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from mimo_local.cache import KVCache, Snapshot
from mimo_local.cache_layers import RingKV, Rows
from mimo_local.errors import DiskSpaceError, MimoError, PackError
from mimo_local.session import Session, common_prefix
from mimo_local.session_manifest import Piece, Saved
from mimo_local.session_rows import (
    HINT,
    Stopped,
    fingerprint,
    full_rows,
    parts_of,
    read_parts,
    rows_like,
    write_parts,
)
from mimo_local.session_store import FOLDER, SessionStore, weights_key
from mimo_local.settings import Paths

if TYPE_CHECKING:
    from mimo_local.settings import Settings
    from mimo_local.tokenizer import Tokenizer

BLOCK: Final = 4096
"""Positions of a piece, at most: 94 MB for the real model. A stopped save keeps finished ones."""
FEW: Final = 4
"""Smaller pieces that may lie within one block before they are written anew as one."""
POINTS: Final = 3
"""Restart points always saved; others while they take a quarter of the rows' bytes at most."""
MUTE: Final = 600.0
"""Seconds without another try after the disk refused."""
TITLE: Final = 80
LOOK: Final = 2000
"""Ids to find a chat's first words in, after its system prompt."""


@dataclass
class _Record:
    """What of a session lies on disk."""

    rows: list[Piece] = field(default_factory=list)
    held: int = 0
    """Positions they hold as the session has them: a piece shared with a branch may go on."""
    saved: Saved | None = None


def open_files(
    settings: Settings,
    new_cache: Callable[[], KVCache],
    *,
    name: str,
    describe: Callable[[list[int]], str] | None = None,
) -> SessionFiles | None:
    """Where the sessions of the model in `settings` rest; None if they are not to be saved."""
    if settings.model is None or settings.sessions_size == 0:
        return None
    try:
        weights = weights_key(settings.model)
    except OSError:  # unreadable now, though it was loaded: saved rows could not be told apart
        return None
    store = SessionStore(Paths.default().cache_dir / FOLDER, settings.sessions_size)
    return SessionFiles(store, new_cache, model=name, weights=weights, describe=describe)


def first_words(tokenizer: Tokenizer | None) -> Callable[[list[int]], str] | None:
    """How to tell people which chat some ids are: by what was said first."""
    if tokenizer is None:
        return None

    def describe(ids: list[int]) -> str:
        text = tokenizer.decode(ids[:LOOK], special=True)
        found = re.search(r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|$)", text, re.DOTALL)
        return found[1] if found else text

    return describe


class SessionFiles:
    """Saves and loads the sessions of one model in one folder."""

    def __init__(
        self,
        store: SessionStore,
        new_cache: Callable[[], KVCache],
        *,
        model: str,
        weights: str,
        describe: Callable[[list[int]], str] | None = None,
    ) -> None:
        """`weights`: see `session_store.weights_key`; `describe`: ids to a line for people."""
        self.store, self.trouble = store, ""
        self._new_cache, self._model, self._describe = new_cache, model, describe
        self._fingerprint = fingerprint(new_cache(), weights)
        self._records: weakref.WeakKeyDictionary[Session, _Record] = weakref.WeakKeyDictionary()
        self._refused: set[str] = set()
        self._mute_until = 0.0

    def find(self, ids: list[int]) -> tuple[Saved, int] | None:
        """The saved session that brings back most of `ids`, and how many; fewer than all."""
        best: tuple[Saved, int] | None = None
        for saved in self.store.sessions():
            if saved.fingerprint != self._fingerprint or saved.id in self._refused:
                continue
            kept = saved.usable_prefix(min(common_prefix(saved.ids, ids), len(ids) - 1))
            if kept and (best is None or kept >= best[1]):
                best = saved, kept
        return best

    def load(self, saved: Saved, n: int) -> Session:
        """A session with the first n ids of a saved one, where `find` said it can bring back n.

        PackError for whatever is not as it was written; such a session is removed.
        """
        try:
            session = self._load(saved, n)
        except PackError:
            self.forget(saved)
            raise
        self.store.touch(saved)
        return session

    def forget(self, saved: Saved) -> None:
        """Remove one that is damaged, and never look at it again."""
        self._refused.add(saved.id)
        try:
            self.store.remove(saved.id)
        except (OSError, MimoError) as error:
            self._give_up(error)

    def unsaved(self, session: Session) -> int:
        """Ids that would have to be read again if it were dropped now."""
        record = self._records.get(session)
        if record is None or record.saved is None:
            return len(session.ids)
        return len(session.ids) - min(session.untouched, len(record.saved.ids))

    def inherit(self, parent: Session, child: Session) -> None:
        """`child` is a fork of `parent`: what that has on disk is its own, too."""
        if (record := self._records.get(parent)) is not None:
            child.untouched = min(parent.untouched, len(child.ids))
            self._records[child] = _Record(list(record.rows), record.held, record.saved)

    def save(self, session: Session, busy: Callable[[], bool]) -> bool:
        """Save what is not saved yet; False if `busy` said to stop, or it could not be: `trouble`.

        Finished pieces of a stopped save are not written again by the next.
        """
        if not session.ids or time.monotonic() < self._mute_until:
            return False
        try:
            self._save(session, busy)
        except Stopped:
            return False
        except (OSError, MimoError) as error:
            self._give_up(error)
            return False
        self.trouble = ""
        return True

    # ---- saving ----------------------------------------------------------------------------------

    def _save(self, session: Session, busy: Callable[[], bool]) -> None:
        record = self._records.setdefault(session, _Record())
        n = len(session.ids)
        extends = record.saved is not None and session.untouched >= len(record.saved.ids)
        if not extends:
            record.saved = None
        start = min(record.held, session.untouched)
        rows = [piece for piece in record.rows if piece.first < start]
        session.untouched = n
        session.remember()
        points = self._points(session)
        lacking = [point for point in points if not isinstance(point.saved, Piece)]
        row_bytes = session.cache.row_bytes
        self.store.check_room(
            (n - start) * row_bytes + sum(point.nbytes for point in lacking),
            n * row_bytes + sum(point.nbytes for point in points),
        )
        self.store.prepare()
        record.rows, record.held = _merged(rows, start)
        while (start := record.held) < n:
            end = min((start // BLOCK + 1) * BLOCK, n)
            parts = [part[start:end] for part in full_rows(session.cache, n)]
            record.rows.append(self._write(".rows", parts, busy, first=start, last=end))
            record.held = end
        for point in lacking:
            starts, parts = parts_of(point)
            point.saved = self._write(
                ".point", parts, busy, first=0, last=point.length, starts=starts, low=point.low
            )
        self._commit(session, record, points)

    def _commit(self, session: Session, record: _Record, points: Sequence[Snapshot]) -> None:
        before = record.saved
        saved = Saved(
            id=secrets.token_hex(4) if before is None else before.id,
            model=self._model,
            fingerprint=self._fingerprint,
            ids=list(session.ids),
            title=before.title if before is not None else self._title(session.ids),
            rows=tuple(record.rows),
            points=tuple(point.saved for point in points if isinstance(point.saved, Piece)),
        )
        try:
            record.saved = self.store.commit(saved)
        except PackError:
            # Somebody removed a piece to make room: all of it is written anew the next time.
            record.rows, record.held, record.saved = [], 0, None
            for point in points:
                point.saved = None
            raise

    def _points(self, session: Session) -> list[Snapshot]:
        """Restart points to save, earliest first."""
        kept: list[Snapshot] = []
        room = len(session.ids) * session.cache.row_bytes // 4
        for point in reversed(session.points):
            room -= point.nbytes
            if len(kept) < POINTS or room >= 0:
                kept.insert(0, point)
        return kept

    def _write(
        self,
        suffix: str,
        parts: list[torch.Tensor],
        busy: Callable[[], bool],
        *,
        first: int,
        last: int,
        starts: dict[str, int] | None = None,
        low: int = 0,
    ) -> Piece:
        """One new file; Stopped if `busy`, and then there is none."""
        with self.store.new_file(suffix) as (fd, name):
            crcs = write_parts(fd, parts, busy)
        nbytes = sum(part.nbytes for part in parts)
        return Piece(name, first, last, nbytes, crcs, starts or {}, low)

    def _title(self, ids: list[int]) -> str:
        if self._describe is None:
            return ""
        text = self._describe(ids)
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:TITLE]

    def _give_up(self, error: Exception) -> None:
        if not isinstance(error, DiskSpaceError):  # found out before anything is written
            self._mute_until = time.monotonic() + MUTE
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror or str(error)
            self.trouble = f"sessions cannot be saved in {self.store.folder}: {reason}"
        else:
            self.trouble = f"a session was not saved: {error}"

    # ---- loading ---------------------------------------------------------------------------------

    def _load(self, saved: Saved, n: int) -> Session:
        at = min(
            (p for p in saved.points if min(n, p.last) == n and n >= p.low), key=lambda p: p.last
        )
        session = Session(self._new_cache)
        cache = session.cache
        pieces = [piece for piece in saved.rows if piece.first < at.last]
        for piece in pieces:
            if piece.nbytes != (piece.last - piece.first) * cache.row_bytes:
                raise PackError(f"{piece.name} is not as long as its rows", hint=HINT)
        cache.blank(max(piece.last for piece in pieces))
        for piece in pieces:
            top = max(piece.last, at.last)
            self._read(piece, [part[piece.first : piece.last] for part in full_rows(cache, top)])
        points = [self._point(cache, p) for p in saved.points if p.last <= at.last]
        session.resume(saved.ids, points)
        session.untouched = len(session.ids)
        self._records[session] = _Record(pieces, len(session.ids), saved)
        session.rewind(n)
        return session

    def _point(self, cache: KVCache, piece: Piece) -> Snapshot:
        """Read a restart point; every claim checked: rows that do not fit would be written past."""
        rings: dict[int, tuple[int, Rows]] = {}
        draft: tuple[int, Rows] | None = None
        parts: list[torch.Tensor] = []
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, RingKV):
                first = piece.starts.get(str(i), -1)
                least = max(0, piece.last - layer.need)
                if not max(0, piece.last - layer.keep) <= first <= least:
                    raise PackError(f"{piece.name}: rows that do not fit layer {i}", hint=HINT)
                rings[i] = first, rows_like(layer.stored, piece.last - first)
                parts += rings[i][1].values()
        if cache.draft is not None and "draft" in piece.starts:
            first, count = piece.starts["draft"], piece.starts.get("draft rows", 0)
            like = cache.draft.snapshot()[1]
            if first + count > piece.last or count > cache.config.max_context:
                raise PackError(f"{piece.name}: rows that do not fit drafting", hint=HINT)
            draft = first, rows_like(like, count)
            parts += draft[1].values()
        self._read(piece, parts)
        return cache.adopt(piece.last, rings, draft, piece)

    def _read(self, piece: Piece, parts: list[torch.Tensor]) -> None:
        """Fill `parts` with a file's bytes; PackError unless they are those once written."""
        if [sum(p.nbytes for p in parts), len(parts)] != [piece.nbytes, len(piece.crcs)]:
            raise PackError(f"{piece.name} is not as long as its rows", hint=HINT)
        fd = self.store.open(piece)
        try:
            read_parts(fd, parts, piece)
        except OSError as e:
            raise PackError(f"{piece.name} cannot be read: {e.strerror}", hint=HINT) from e
        finally:
            os.close(fd)


def _merged(rows: list[Piece], start: int) -> tuple[list[Piece], int]:
    """Where to go on writing: at the block's beginning if there are many small pieces in it."""
    block = start // BLOCK * BLOCK
    small = [piece for piece in rows if piece.first >= block]
    if len(small) < FEW:
        return rows, start
    return [piece for piece in rows if piece.first < block], block
