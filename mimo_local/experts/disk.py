"""The disk tier: whole experts read directly into memory, several at a time, checked on first read.

Reads bypass the page cache where the file system lets them (O_DIRECT), so that memory holds every
expert once. An expert is read in parts that several threads share: one missing expert alone already
keeps a drive's queue filled. Demand goes before reads that somebody only expects to need. Knows
files and bytes, no tensors and no policy; called by `tiered`.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final, TypeAlias

from mimo_local import kernels
from mimo_local.errors import PackError
from quant.layout import PAGE, ExpertLayout

Key: TypeAlias = tuple[int, int]
"""(layer, expert)."""
Preadv: TypeAlias = Callable[[int, Sequence[memoryview], int], int]

PART: Final = 4 << 20
"""Bytes of one read: from 1 MB up a drive's rate no longer depends on it, and four parts of a real
expert (13.4 MB) are on their way at once."""
DEPTH: Final = 8
"""Reads in flight: NVMe drives of 7 GB/s and more need that many, others lose nothing by it."""
_REDO: Final = "run `mimo verify` on the pack; copy the file again, or make the pack again"


class Read:
    """One expert on its way from disk into a slot."""

    __slots__ = (
        "buffer",
        "dropped",
        "error",
        "key",
        "landed",
        "left",
        "listener",
        "slot",
        "urgent",
    )

    def __init__(self, key: Key, slot: int, buffer: memoryview, parts: int) -> None:
        self.key, self.slot, self.buffer = key, slot, buffer
        self.error: PackError | None = None
        self.listener: SimpleQueue[Read] | None = None
        self.urgent = self.dropped = self.landed = False
        self.left = parts
        """Parts that have not ended. When all have, with the expert's bytes or with `error`, and
        the bytes are checked, the read has `landed`."""


@dataclass(slots=True)
class _File:
    """An open file of experts; `stamp` tells whether somebody changed it since."""

    name: str
    fd: int
    direct: bool
    stamp: tuple[int, int]


@dataclass(slots=True)
class _Part:
    read: Read
    start: int
    stop: int


class DiskTier:
    """The experts of a pack where they are stored."""

    def __init__(
        self,
        folder: Path,
        layouts: dict[int, ExpertLayout],
        *,
        depth: int = DEPTH,
        preadv: Preadv = os.preadv,
    ) -> None:
        """`layouts`: by layer. Opens files when they are first read. `preadv`: replaced in tests.

        PackError from `wait` names the file: unreadable, ended early, changed, or damaged.
        """
        self.folder, self.layouts, self.depth = folder, layouts, depth
        self.nbytes = sum(x.stride * x.count for x in layouts.values())
        self.bytes_read = 0
        self.notes: list[str] = []
        """What the user should know: reads that go through the page cache after all."""
        self._preadv = preadv
        self._files: dict[str, _File] = {}
        self._checked = {layer: bytearray(x.count) for layer, x in layouts.items()}
        self._urgent: deque[_Part] = deque()
        self._later: deque[_Part] = deque()
        self._lock = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    # ---- the engine's thread ---------------------------------------------------------------------

    def read(
        self,
        key: Key,
        slot: int,
        buffer: memoryview,
        *,
        listener: SimpleQueue[Read] | None = None,
        urgent: bool = True,
    ) -> Read:
        """Start to read an expert into `buffer` (page-aligned, stride bytes at least).

        `listener` gets the Read once it has landed, whole or with its `error` set.
        """
        stride = self.layouts[key[0]].stride
        starts = range(0, stride, PART)
        read = Read(key, slot, buffer[:stride], len(starts))
        read.listener, read.urgent = listener, urgent
        parts = [_Part(read, start, min(start + PART, stride)) for start in starts]
        with self._lock:
            if self._closed:
                raise PackError("the pack was closed", hint="load the model again")
            (self._urgent if urgent else self._later).extend(parts)
            while len(self._threads) < self.depth:
                thread = threading.Thread(target=self._work, name="mimo-disk", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._lock.notify(len(parts))
        return read

    def hasten(self, read: Read, listener: SimpleQueue[Read]) -> None:
        """Somebody waits for a read that was only expected to be needed."""
        with self._lock:
            if read.landed:
                listener.put(read)
                return
            read.listener = listener
            if not read.urgent:
                read.urgent = True
                mine = [part for part in self._later if part.read is read]
                self._later = deque(part for part in self._later if part.read is not read)
                self._urgent.extend(mine)

    def forget(self, read: Read) -> bool:
        """Take back what of a read has not begun; False: some of it goes on, wait until it landed.

        What lands then is no expert, and is not checked.
        """
        with self._lock:
            if read.landed:
                return True
            read.dropped = True
            for queue in (self._later, self._urgent):
                mine = [part for part in queue if part.read is read]
                for part in mine:
                    queue.remove(part)
                read.left -= len(mine)
                read.landed = read.landed or (bool(mine) and not read.left)
            return read.landed

    def wait(self, reads: Sequence[Read]) -> None:
        """Until all of them have landed, whatever became of them."""
        with self._lock:
            self._lock.wait_for(lambda: all(read.landed for read in reads))

    def close(self) -> None:
        """Finish what is being read, then let go of threads and files."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    # ---- the readers' threads --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._urgent or self._later or self._closed)
                if not self._urgent and not self._later:
                    return
                part = (self._urgent or self._later).popleft()
            error = None
            if part.read.error is None:
                try:
                    self._fill(part)
                except PackError as found:
                    error = found
                except BaseException as found:  # a waiting step must not wait for ever
                    error = PackError(f"cannot read experts: {found!r}", hint=_REDO)
            self._end(part.read, part.stop - part.start, error)
            del part, error  # an error holds on to the frames it passed, and so to the store

    def _end(self, read: Read, nbytes: int, error: PackError | None) -> None:
        with self._lock:
            read.error = read.error or error
            self.bytes_read += nbytes if error is None else 0
            read.left -= 1  # under one lock with the question: two parts may end at once
            if read.left:
                return
        if read.error is None and not read.dropped:
            try:
                self._check(read)
            except PackError as found:
                read.error = found
            except BaseException as found:  # as above: it has to land
                read.error = PackError(f"cannot check experts: {found!r}", hint=_REDO)
        with self._lock:
            read.landed = True
            if read.listener is not None:
                read.listener.put(read)
            self._lock.notify_all()

    def _fill(self, part: _Part) -> None:
        layer, expert = part.read.key
        layout = self.layouts[layer]
        file = self._open(layout.file)
        offset, view = layout.offset0 + expert * layout.stride, part.read.buffer
        what = f"expert {expert} of layer {layer}"
        at = part.start
        while at < part.stop:
            direct = file.direct
            try:
                got = self._preadv(file.fd, [view[at : part.stop]], offset + at)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._buffered(file)
                    continue
                reason = error.strerror or error
                raise PackError(
                    f"cannot read {what} from {file.name}: {reason}", hint=_REDO
                ) from error
            # A direct read goes on from a whole page only; less than one is the end of the file.
            done = got if at + got == part.stop else got // PAGE * PAGE
            if done <= 0:
                raise PackError(f"{file.name} ends inside {what}", hint=_REDO)
            at += done

    def _check(self, read: Read) -> None:
        """Compare the checksum the first time, and again after somebody wrote to the file."""
        layer, expert = read.key
        layout = self.layouts[layer]
        file = self._files[layout.file]
        stat = os.fstat(file.fd)
        stamp = (stat.st_size, stat.st_mtime_ns)
        if stamp != file.stamp:
            if stamp[0] != file.stamp[0]:
                raise PackError(f"{file.name} was changed while it was in use", hint=_REDO)
            with self._lock:
                for other, x in self.layouts.items():
                    if x.file == layout.file:
                        self._checked[other] = bytearray(x.count)
                file.stamp = stamp
        if self._checked[layer][expert]:
            return
        if checksum(read.buffer) != layout.crc32[expert]:
            raise PackError(
                f"{file.name} is damaged: checksum of expert {expert} of layer {layer} is wrong",
                hint=_REDO,
            )
        self._checked[layer][expert] = 1

    def _open(self, name: str) -> _File:
        with self._lock:
            if name in self._files:
                return self._files[name]
            path = self.folder / name
            flags = os.O_RDONLY | os.O_CLOEXEC
            direct = hasattr(os, "O_DIRECT")
            try:
                try:
                    fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
                except OSError as error:
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    direct, fd = False, os.open(path, flags)
            except OSError as error:
                raise PackError(f"cannot open {name}: {error.strerror}", hint=_REDO) from error
            stat = os.fstat(fd)
            file = self._files[name] = _File(name, fd, direct, (stat.st_size, stat.st_mtime_ns))
            if not direct:
                self._note()
            return file

    def _buffered(self, file: _File) -> None:
        """The file system took O_DIRECT and refuses to read so (some FUSE ones): without it."""
        import fcntl

        with self._lock:
            if file.direct:
                flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
                fcntl.fcntl(file.fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
                file.direct = False
                self._note()

    def _note(self) -> None:
        note = "experts are read through the page cache: this file system knows no direct reads"
        if note not in self.notes:
            self.notes.append(note)


def checksum(data: memoryview) -> int:
    """zlib.crc32, at several times its speed where there are kernels."""
    native = kernels.get()
    if native is None:
        return zlib.crc32(data)
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return native.crc32(address, len(data))
