"""The folder where sessions rest: what lies there, of which model, how large, what goes first.

A saved session is a manifest (`ID.session`: ids, and which pieces hold what) and pieces it shares
with its branches (`*.rows`: keys and values of some positions; `*.point`: a restart point). Pieces
are never changed; a manifest appears whole, after its pieces. Any number of programs may use one
folder: a lock is held while names change, a session whose piece another one removed is refused.
Knows no tensors and no torch; `session_files` fills it, `mimo sessions` shows it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from mimo_local.errors import DiskSpaceError, MimoError, PackError
from mimo_local.session_manifest import Piece, Saved, State, parsed, written
from mimo_local.settings import PACK_MANIFEST

FOLDER: Final = "sessions"
"""Of the cache folder."""
SUFFIXES: Final = (".session", ".rows", ".point")
DEFAULT_SIZE: Final = 10_000_000_000
FREE_SHARE: Final = 10
"""Unasked at most a tenth of the free disk."""
DISK_RESERVE: Final = 1_000_000_000
"""Bytes of the disk that nothing saved unasked may take."""
ORPHAN_AGE: Final = 3600.0
"""Seconds after which a piece no manifest names is nobody's: its writer gave up or died."""
LOCK_WAIT: Final = 2.0
_HINT: Final = "delete it with `mimo sessions rm`: the chat can be read again from its text"


class SessionStore:
    """One folder. Errors of the disk are MimoErrors; nothing is created before the first save."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """`limit`: most bytes; None: 10 GB or a tenth of what is free, whichever is less."""
        self.folder, self._limit = folder, limit
        self._known: dict[str, tuple[tuple[int, int], Saved | State]] = {}

    @property
    def limit(self) -> int:
        """Most bytes of all files."""
        if self._limit is not None:
            return self._limit
        return min(DEFAULT_SIZE, (self._free() + self.nbytes) // FREE_SHARE)

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(size for _, size, _ in self._files())

    def sessions(self) -> list[Saved]:
        """All manifests of this version that can be read, the longest unused first."""
        found = {}
        for name, size, when in self._files():
            if not name.endswith(".session"):
                continue
            stamp = (size, int(when * 1e9))
            if name not in self._known or self._known[name][0] != stamp:
                self._known[name] = (stamp, self._read(name, when))
            found[name] = self._known[name]
        self._known = found
        ours = [saved for _, saved in found.values() if isinstance(saved, Saved)]
        return sorted(ours, key=lambda saved: saved.used)

    @property
    def unreadable(self) -> int:
        """Saved sessions of another version, damaged, or somebody else's."""
        self.sessions()
        return sum(not isinstance(saved, Saved) for _, saved in self._known.values())

    def size_of(self, saved: Saved) -> int:
        """Bytes that removing it would free: pieces only it names, and its manifest."""
        others = {p.name for s in self.sessions() if s.id != saved.id for p in s.pieces}
        own = sum(piece.nbytes for piece in saved.pieces if piece.name not in others)
        with suppress(OSError):
            own += self._path(saved.id + ".session").stat().st_size
        return own

    def touch(self, saved: Saved) -> None:
        """It was used just now."""
        with suppress(OSError):
            os.utime(self._path(saved.id + ".session"))

    def open(self, piece: Piece) -> int:
        """A descriptor to read a piece with; PackError if it is not there as it was written."""
        try:
            fd = os.open(self._path(piece.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise PackError(f"saved rows are gone: {e.strerror}: {piece.name}", hint=_HINT) from e
        if os.fstat(fd).st_size != piece.nbytes:
            os.close(fd)
            raise PackError(f"saved rows are cut short: {piece.name}", hint=_HINT)
        return fd

    # ---- writing ---------------------------------------------------------------------------------

    def check_room(self, nbytes: int, whole: int) -> None:
        """Raise DiskSpaceError if `nbytes` more are too many, or a session of `whole` bytes."""
        if whole > self.limit:
            raise DiskSpaceError(
                f"a session of {whole} bytes is more than the {self.limit} that may be kept",
                hint="raise `sessions_size`",
            )
        free = self._free()
        if nbytes + DISK_RESERVE > free:
            raise DiskSpaceError(
                f"{free} bytes of disk are free: too few to save a session of {nbytes}",
                hint="free some space, or set `sessions_size = 0`",
            )

    def prepare(self) -> None:
        """Make the folder, for its owner's eyes only. OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)

    @contextmanager
    def new_file(self, suffix: str) -> Iterator[tuple[int, str]]:
        """(descriptor, name) of a file that appears under its name if the body succeeds."""
        name = secrets.token_hex(8) + suffix
        part = self._path(name + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd, name
            os.fsync(fd)
            part.replace(self._path(name))
        finally:
            os.close(fd)
            part.unlink(missing_ok=True)

    def commit(self, saved: Saved) -> Saved:
        """Write its manifest, in place of an older one of the same id, and make room for it.

        PackError if a piece is no longer there: another program made room. OSError, DiskSpaceError.
        """
        with self._locked():
            for piece in saved.pieces:
                os.close(self.open(piece))
            before = next((s for s in self.sessions() if s.id == saved.id), None)
            with self.new_file(".manifest") as (fd, name):
                write_all(fd, memoryview(written(saved)))
            self._path(name).replace(self._path(saved.id + ".session"))
            self._sync()
            self._drop_pieces(before.pieces if before else ())
            self._make_room(saved.id)
        return replace(saved, used=time.time())

    def remove(self, *ids: str) -> int:
        """Delete sessions (of any version or model) and what only they need; bytes freed."""
        before = self.nbytes
        with self._locked():
            for name in ids:
                self._remove(name)
        return before - self.nbytes

    def remove_all(self) -> int:
        """Delete everything that was saved here, of whatever version; bytes freed."""
        before = self.nbytes
        with self._locked():
            for name, _, _ in self._files():
                self._path(name).unlink(missing_ok=True)
        return before - self.nbytes

    def tidy(self) -> None:
        """Hold the limit, delete what writers left behind."""
        if self.folder.is_dir():
            with self._locked():
                self._make_room("")

    # ---- inside, under the lock ------------------------------------------------------------------

    def _make_room(self, spare: str) -> None:
        """Remove damaged manifests, old orphans, and the longest unused until the limit holds."""
        named, now = self._named(), time.time()
        for name in [name for name, (_, saved) in self._known.items() if saved == "damaged"]:
            self._path(name).unlink(missing_ok=True)
        # What manifests of another version name cannot be told: theirs are left to them.
        foreign = any(saved == "foreign" for _, saved in self._known.values())
        for name, _, when in self._files():
            stray = not name.endswith(".session") and name not in named and not foreign
            if stray and now - when > ORPHAN_AGE:
                self._path(name).unlink(missing_ok=True)
        limit = self.limit
        files = [f for f in self._files() if f[0].endswith(".session")]
        for name, _, _ in sorted(files, key=lambda f: f[2]):
            if self.nbytes <= limit:
                return
            if name != spare + ".session":
                self._remove(name.removesuffix(".session"))

    def _remove(self, ident: str) -> None:
        path = self._path(ident + ".session")
        saved = self._read(path.name, 0.0)
        path.unlink(missing_ok=True)
        self._drop_pieces(saved.pieces if isinstance(saved, Saved) else ())

    def _named(self) -> set[str]:
        return {piece.name for saved in self.sessions() for piece in saved.pieces}

    def _drop_pieces(self, pieces: tuple[Piece, ...]) -> None:
        named = self._named()
        for piece in pieces:
            if piece.name not in named:
                self._path(piece.name).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.prepare()
        fd = os.open(self._path(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + LOCK_WAIT
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise MimoError(
                            f"another program holds {self.folder / '.lock'}",
                            hint="wait for it, or end it",
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    # ---- inside ----------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _free(self) -> int:
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            return shutil.disk_usage(place).free
        except OSError:
            return 0

    def _files(self) -> list[tuple[str, int, float]]:
        """(name, bytes, time of last use) of everything that is ours; empty if there is nothing."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                ours = entry.name.endswith((*SUFFIXES, ".manifest", ".part"))
                with suppress(OSError):  # removed meanwhile
                    if ours and entry.is_file(follow_symlinks=False):
                        facts = entry.stat(follow_symlinks=False)
                        found.append((entry.name, facts.st_size, facts.st_mtime))
        return found

    def _read(self, name: str, when: float) -> Saved | State:
        """A manifest, or why it is none for us: somebody else's are as those of other versions."""
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return "foreign"
        return parsed(data, name.removesuffix(".session"), when)


def weights_key(folder: Path) -> str:
    """Tells weights apart: a pack by its manifest, which has checksums, a checkpoint by its files.

    OSError if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    manifest = folder / PACK_MANIFEST
    if manifest.is_file():
        digest.update(manifest.read_bytes())
        return digest.hexdigest()
    digest.update((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def write_all(fd: int, data: memoryview) -> None:
    """`os.write` until all is written. OSError."""
    while data:
        data = data[os.write(fd, data) :]
