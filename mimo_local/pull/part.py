"""One file on its way to the disk: written in any order, hashed in order, whole only when proven.

What is noted of it survives any death of the process; what is not yet proven never has the file's
own name. Knows no network. Called by `fetch`.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from mimo_local.errors import CheckpointError, DownloadError
from mimo_local.pull.hub import RemoteFile
from mimo_local.pull.ranges import Ranges, gaps, merged, noted, written
from mimo_local.pull.staging import DAMAGED, Staging
from quant.tensorfile import TensorFile, pread_into
from quant.writer import sync_folder, writing

HASHED: Final = 4 << 20
"""Bytes hashed at a time."""


class Part:
    """One file on its way: written in any order, hashed in order, and whole only when proven."""

    def __init__(self, staging: Staging, file: RemoteFile) -> None:
        """Begin, or go on with what an earlier run left of this very file."""
        self.file = file
        self.path = staging.state / f"{file.name}.part"
        self.log = staging.state / f"{file.name}.ranges"
        self._staging = staging
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        self._log_fd = -1
        with writing(self.path, 0, file.size):
            ranges = self._logged()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self.path, flags | (0 if ranges else os.O_TRUNC), 0o644)
            size = min(os.fstat(self._fd).st_size, file.size)
            os.ftruncate(self._fd, size)
            self._ranges = merged([(a, min(b, size)) for a, b in ranges if a < size])
            self._relog()
        self._begin()

    @property
    def covered(self) -> int:
        """Bytes that are here."""
        with self._lock:
            return sum(b - a for a, b in self._ranges)

    def missing(self) -> Ranges:
        """The ranges that are not here yet."""
        with self._lock:
            return gaps(self._ranges, 0, self.file.size)

    def write(self, data: bytes, offset: int) -> None:
        """Bytes from `offset` on; DiskSpaceError when there is no room.

        What is here stays as it is: it may have been hashed already, or be proven as a whole.
        """
        with self._lock, writing(self.path, 0, self.file.size):
            for start, stop in gaps(self._ranges, offset, offset + len(data)):
                view = memoryview(data)[start - offset : stop - offset]
                while view and self._fd >= 0:
                    n = os.pwrite(self._fd, view, start)
                    self._ranges = merged([*self._ranges, (start, start + n)])
                    view, start = view[n:], start + n

    def note(self, start: int, stop: int) -> None:
        """Remember a range for later runs, once it is on the disk."""
        with self._lock:
            if start >= stop or self._fd < 0:
                return
            fd = os.dup(self._fd)  # the file may be whole and closed before the disk is done
        try:
            with writing(self.log, 0, 0):
                getattr(os, "fdatasync", os.fsync)(fd)  # macOS has the one only
                with self._lock:
                    if self._log_fd >= 0 and not gaps(self._ranges, start, stop):
                        os.write(self._log_fd, f"{start} {stop}\n".encode())
        finally:
            os.close(fd)

    def hash_on(self) -> None:
        """Hash what lies in a row from the beginning, unless another thread is at it."""
        while self._hashing.acquire(blocking=False):
            try:
                if not self._hash_piece():
                    return
            finally:
                self._hashing.release()

    def proven(self) -> bool:
        """With all bytes here: whether they are the right ones."""
        with self._hashing:
            while self._hash_piece():
                pass
        return self.digest == self.file.digest

    @property
    def digest(self) -> str:
        """The checksum of what came."""
        return str(self._digest.hexdigest())

    def begin_again(self) -> None:
        """Forget all bytes: they were not the right ones."""
        with self._lock, writing(self.path, 0, 0):
            self._ranges = []
            os.ftruncate(self._fd, 0)
            os.close(self._log_fd)
            self._relog()
        self._begin()

    def finish(self) -> None:
        """Make it durable, keep the samples the fingerprint wants, then give it its name."""
        with writing(self.path, self.file.size, self.file.size):
            os.fsync(self._fd)
            self.close()
            if self.file.name.endswith(".safetensors"):
                self._keep_samples()
            self.path.replace(self._staging.folder / self.file.name)
            sync_folder(self._staging.folder)
            self.log.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; what is noted stays."""
        with self._lock:
            for fd in (self._fd, self._log_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._log_fd = -1

    def _hash_piece(self) -> bool:
        """Hash some more of the bytes in a row; False when there are none."""
        with self._lock:
            front = self._ranges[0][1] if self._ranges and not self._ranges[0][0] else 0
        if self._hashed >= front:
            return False
        buffer = memoryview(bytearray(min(HASHED, front - self._hashed)))
        with writing(self.path, 0, 0):
            got = pread_into(self._fd, buffer, self._hashed)
        self._digest.update(buffer[:got])
        self._hashed += got
        return got > 0

    def _keep_samples(self) -> None:
        with self.path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), self.file.size))
        planned = f"headers/{self.file.name}"
        if self._staging.kept(planned) not in (None, head):
            (self._staging.state / planned).unlink()
            raise DownloadError(
                f"what was read of {self.file.name} for planning was damaged on its way",
                hint="run the same command again: the header is read anew",
            )
        known = TensorFile(
            self.path, error=CheckpointError, hint=DAMAGED, known=(self.file.size, head)
        )
        samples = bytearray()
        for start, stop in known.samples():
            piece = bytearray(stop - start)
            known.read_into(memoryview(piece), start, "the fingerprint")
            samples += piece
        self._staging.keep(f"{self.file.name}.samples", bytes(samples))

    def _begin(self) -> None:
        self._hashed = 0
        self._digest = self.file.hasher()

    def _logged(self) -> Ranges:
        """Ranges an earlier run noted of the same file."""
        try:
            text = self.log.read_text(encoding="ascii")
        except (OSError, ValueError):
            return []
        return noted(text, self.file.identity, self.file.size) if self.path.exists() else []

    def _relog(self) -> None:
        """Begin the log of ranges anew with those that count."""
        new = self.log.with_name(self.log.name + ".tmp")
        new.write_text(written(self.file.identity, self._ranges), encoding="ascii")
        new.replace(self.log)
        self._log_fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
