"""Experts on their way to a device: pinned buffers that several threads fill, and slots there.

Each slot has a buffer of its own on the host, and one copy brings all of an expert: its codes and
scales as they are stored. A buffer is filled when its last copy is over; a slot is overwritten when
the device has used what is in it. Knows bytes, no products. Called by `device_sweep`.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import torch

from mimo_local.device import Mark, Stream, host_buffer
from mimo_local.experts.slots import MATRICES
from mimo_local.weights import Expert, QuantLinear

THREADS: Final = 4
"""That fill a buffer: one core copies 10 GB/s, the bus takes 25."""
PIECE: Final = 1 << 20
"""Bytes below which another thread costs more than it gives."""
ALIGN: Final = 256
"""Bytes; where a part begins in a slot, as torch's own allocations do."""
_PARTS: Final = 3 * 2


class Slot:
    """Room for one expert on the device, and its buffer on the host."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.host = host_buffer((nbytes,), torch.uint8, device)
        self.there = torch.empty((nbytes,), dtype=torch.uint8, device=device)
        self.arrived, self.used = Mark(device), Mark(device)
        self.used.set()  # this memory may be what work already queued still reads
        self.filled = 0
        """Bytes of the expert in `host`."""
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        """Matrix -> part -> its bytes on the device, of the host's dtype and shape."""

    def lay_out(self, expert: Expert) -> list[tuple[int, torch.Tensor]]:
        """Set `parts`; [(where it begins in the slot, the host's part)]."""
        found, at = [], 0
        self.parts = {}
        for name in MATRICES:
            linear: QuantLinear = getattr(expert, name)
            self.parts[name] = {}
            for part, tensor in linear.parts.items():
                n = tensor.nbytes
                flat = self.there[at : at + n]
                self.parts[name][part] = flat.view(tensor.dtype).view(tensor.shape)
                found.append((at, tensor.contiguous()))
                at += -(-n // ALIGN) * ALIGN
        self.filled = at
        return found


class Uploader:
    """Brings one expert after the other to the device."""

    def __init__(self, nbytes: int, device: torch.device, slots: int) -> None:
        """`nbytes`: of the largest expert, as the host stores it."""
        room = nbytes + _PARTS * ALIGN
        self._slots = [Slot(room, device) for _ in range(slots)]
        self._copies = Stream(device)
        self._threads = min(THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads, "mimo-upload")
        self._turn = 0
        self._filling: list[Future[None]] = []

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the slots take."""
        return sum(slot.there.nbytes for slot in self._slots)

    def begin(self, expert: Expert) -> Slot:
        """Start to gather an expert's bytes, which must stay until `send`."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        slot.arrived.wait()  # the copy that last read the buffer
        parts = slot.lay_out(expert)
        base, total = slot.host.data_ptr(), sum(part.nbytes for _, part in parts)
        count = max(1, min(self._threads, total // PIECE))
        self._filling = [self._pool.submit(_copy, base, parts, i, count) for i in range(count)]
        return slot

    def send(self, slot: Slot) -> None:
        """Once they are all there: over the bus, as soon as the device has used what it has."""
        filling, self._filling = self._filling, []
        for future in filling:
            future.result()
        with self._copies.use():
            slot.used.hold(self._copies)
            n = slot.filled
            slot.there[:n].copy_(slot.host[:n], non_blocking=True)
            slot.arrived.set()

    def stop(self) -> None:
        """Nobody reads from what was given to `begin` afterwards."""
        for future in self._filling:
            future.exception()
        self._filling = []

    def close(self) -> None:
        """End the threads, give the memory back."""
        self.stop()
        self._pool.shutdown()
        for slot in self._slots:
            slot.arrived.wait()
        self._slots.clear()


def _copy(base: int, parts: list[tuple[int, torch.Tensor]], i: int, count: int) -> None:
    """The i-th of `count` pieces of every part; memmove lets other threads run."""
    for at, part in parts:
        n = part.nbytes
        a, b = n * i // count, n * (i + 1) // count
        ctypes.memmove(base + at + a, part.data_ptr() + a, b - a)
