"""Memory for experts: equal slots of one mapping, on huge pages, given back when asked to."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Final

from mimo_local.errors import NotEnoughMemoryError
from quant.layout import PAGE

HUGE: Final = 2 << 20
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, which Python's mmap does not name
_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class Arena:
    """`count` slots of at least `size` bytes. Address space only, until a slot is written to."""

    def __init__(self, count: int, size: int) -> None:
        # Whole pages, for direct reads; whole huge pages would cost a real expert 9.8 % more.
        self.slot_bytes = -(-size // PAGE) * PAGE
        self.count = count
        nbytes = max(count, 1) * self.slot_bytes + HUGE
        try:
            self._map = mmap.mmap(-1, nbytes, flags=_FLAGS)
        except (OSError, OverflowError, ValueError) as error:
            raise NotEnoughMemoryError(
                f"no room for {count} experts of {size / 1e6:.1f} MB: {error}",
                hint="give the experts less memory with `--ram`",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._skip = -base % HUGE
        self._base = base + self._skip
        self._view = memoryview(self._map)
        self._backed = bytearray(self.count)

    def address(self, slot: int) -> int:
        """Where a slot begins: a multiple of the page size."""
        return self._base + slot * self.slot_bytes

    def view(self, slot: int) -> memoryview:
        """A slot's bytes."""
        start = self._skip + slot * self.slot_bytes
        return self._view[start : start + self.slot_bytes]

    def populate(self, slot: int) -> None:
        """Give a slot its pages now, if it has none.

        A direct read that has to make its pages itself took 16 ms for 13.4 MB where one into
        existing pages took 3.5: several readers fault in the same huge pages. This takes 0.6 ms.
        """
        if self._backed[slot]:
            return
        self._backed[slot] = 1
        start = self._skip + slot * self.slot_bytes
        try:
            self._map.madvise(_POPULATE_WRITE, start, self.slot_bytes)
        except (OSError, ValueError):  # Linux before 5.14: a byte of each page, then
            self._view[start : start + self.slot_bytes : PAGE] = bytes(self.slot_bytes // PAGE)

    def release(self, slot: int) -> None:
        """Give a slot's pages back to the system; it reads as zeros until it is written again."""
        self._backed[slot] = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self._skip + slot * self.slot_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self.slot_bytes)
