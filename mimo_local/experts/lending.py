"""Lends a layer's experts to who computes elsewhere: each read once, in order, the next ones ahead.

What is in RAM is lent where it lies; what is not passes through ring slots, as in a sweep, and
stays only where there is room that nobody uses. Several loans of one layer may be under way in one
thread, and other steps between two experts. Knows slots and reads, no arithmetic. Called by
`tiered`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING

from mimo_local.experts.disk import Read
from mimo_local.weights import Expert

if TYPE_CHECKING:
    from mimo_local.experts.tiered import TieredStore


class Loan:
    """One stream of experts out of a `TieredStore`; see `Store.stream`."""

    def __init__(
        self, store: TieredStore, layer: int, wanted: Mapping[int, int], held: int, slots: int
    ) -> None:
        self.store, self.layer = store, layer
        self.held, self.slots = held, slots
        self.order = sorted(wanted)
        self.reads: dict[int, Read] = {}
        """Begun, landed or lent, and still in a ring slot."""
        self.landed: SimpleQueue[Read] = SimpleQueue()
        self.ready: set[int] = set()
        self.lent: deque[int] = deque()
        # What a prompt reads only fills what is empty: with the experts it uses most.
        absent = [e for e in self.order if (layer, e) not in store.ram]
        absent.sort(key=lambda e: -wanted[e])
        self.worth = set(absent[: max(0, store.ram.room(layer))])

    def items(self) -> Generator[tuple[int, Expert], None, None]:
        """(expert, its matrices), ascending."""
        try:
            self._claim()
            for i, e in enumerate(self.order):
                while len(self.lent) >= self.held:
                    self._take_back()
                slot = self._slot(e, self.order[i:])
                self.lent.append(e)
                yield e, self.store.ram.expert(self.layer, slot)
            while self.lent:
                self._take_back()
        finally:
            self._close()

    def _claim(self) -> None:
        """Reads begun on a guess that came true."""
        store = self.store
        for e in self.order:
            if len(self.reads) >= self.slots:
                return
            read = store.claim((self.layer, e))
            if read is not None:
                self.reads[e] = read
                store.disk.hasten(read, self.landed)

    def _slot(self, e: int, rest: list[int]) -> int:
        """Where expert e lies, once it does; the next ones of `rest` are read meanwhile."""
        held = self._held(e)
        if held is None and e not in self.reads:
            self._begin(e, self._free())
        for later in rest:
            if len(self.reads) >= self.slots:
                break
            if later in self.reads or (self.layer, later) in self.store.ram:
                continue
            slot = self.store.borrow()
            if slot is None:
                break
            self._begin(later, slot)
        return self._landed(e) if held is None else held

    def _held(self, e: int) -> int | None:
        """Its slot in RAM, if it is there; a read of it is then not needed (others brought it)."""
        slot = self.store.ram.slot((self.layer, e))
        if slot is not None and e in self.reads:
            self._drop(e)
        return slot

    def _begin(self, e: int, slot: int) -> None:
        key, view = (self.layer, e), self.store.ram.arena.view(slot)
        self.reads[e] = self.store.disk.read(key, slot, view, listener=self.landed)

    def _free(self) -> int:
        """A ring slot for the expert wanted now; reads for later ones give way."""
        while len(self.reads) >= self.slots or (slot := self.store.borrow()) is None:
            later = [other for other in self.reads if other not in self.lent]
            if not later:
                return self.store.free_slot()
            self._drop(max(later))
        return slot

    def _landed(self, e: int) -> int:
        start = time.perf_counter()
        while e not in self.ready:
            read = self.landed.get()
            if read.error is not None:
                raise read.error
            if self.reads.get(read.key[1]) is read:  # else it gave way after it landed
                self.ready.add(read.key[1])
                self.store.meters.sweep_bytes += len(read.buffer)
        self.store.meters.wait_s += time.perf_counter() - start
        return self.reads[e].slot

    def _take_back(self) -> None:
        """The expert lent first: it stays if it may, else its slot is free."""
        e, store = self.lent.popleft(), self.store
        read = self.reads.pop(e, None)
        self.ready.discard(e)
        if read is None:
            return
        key = (self.layer, e)
        if e in self.worth and store.ram.room(self.layer) > 0 and key not in store.ram:
            store.meters.evictions += store.ram.keep(key, read.slot)
        else:
            store.ram.give_back(read.slot)

    def _drop(self, e: int) -> None:
        read = self.reads.pop(e)
        self.ready.discard(e)
        read.listener = None
        self.store.discard(read)

    def _close(self) -> None:
        while self.lent:
            self._take_back()
        for e in list(self.reads):
            self._drop(e)
        self.store.drop_guesses(self.layer)
        self.store.meters.disk_bytes = self.store.disk.bytes_read
