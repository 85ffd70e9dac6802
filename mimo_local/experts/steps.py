"""One layer's step through the tiers: what is at hand is computed, the rest as it lands.

`Few`: up to FEW_ROWS rows, each expert's result on its own and added up in the end. `InOrder`: many
rows, experts ascending, each read while the ones before it are computed. Both give the bits of
`ExpertStore.run`. Called by `tiered`, whose slots, reads and meters they use.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Collection, Iterable
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from mimo_local import kernels
from mimo_local.errors import CancelledError
from mimo_local.experts.disk import Read
from mimo_local.experts.policy import Key
from mimo_local.experts.store import BATCH_PAIRS, apply

if TYPE_CHECKING:
    from mimo_local.experts.tiered import TieredStore


class _Work:
    """One layer's step: what is computed from slots, and the reads it is waiting for."""

    def __init__(
        self, store: TieredStore, layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor
    ) -> None:
        self.store, self.layer, self.x = store, layer, x
        self.ids, self.w = ids.to(torch.int32).contiguous(), w.contiguous()
        self.native = kernels.get() if x.device.type == "cpu" else None
        self.landed: SimpleQueue[Read] = SimpleQueue()
        self.reads: dict[Key, Read] = {}
        """Begun and not yet used."""

    def begin_reads(self, keys: list[Key], most: int = 1 << 30) -> None:
        """Read from the front of `keys` as far as the ring goes; those begun are taken off.

        `most`: slots that may be taken at once.
        """
        store = self.store
        while keys and len(self.reads) < most:
            slot = store.borrow() if self.reads else store.free_slot()
            if slot is None:
                return
            self._begin(keys.pop(0), slot)

    def _begin(self, key: Key, slot: int) -> None:
        view = self.store.ram.arena.view(slot)
        self.reads[key] = self.store.disk.read(key, slot, view, listener=self.landed)

    def next_landed(self, *, block: bool) -> Read | None:
        """A read that has landed; raises what became of it if that is an error."""
        if not block and self.landed.empty():
            return None
        start = time.perf_counter()
        read = self.landed.get()
        self.store.meters.wait_s += time.perf_counter() - start
        if read.error is not None:
            raise read.error
        return read

    def abandon(self) -> None:
        """Give up on the reads that are left."""
        for read in self.reads.values():
            read.listener = None
            self.store.discard(read)
        self.reads.clear()

    def mlps(self, slots: Iterable[int]) -> ctypes.Array[kernels.Mlp]:
        """The experts in these slots, one after another."""
        found = [self.store.ram.mlp(self.layer, slot) for slot in slots]
        return (kernels.Mlp * len(found))(*found)


class Few(_Work):
    """Up to FEW_ROWS rows: every expert's result on its own, in the order they are at hand."""

    def run(self, meanwhile: Callable[[], None] | None) -> torch.Tensor:
        """-> (T, D). `meanwhile` is called once the first reads have begun."""
        t, k = self.ids.shape
        self.pairs: dict[int, list[int]] = {}
        for i, e in enumerate(self.ids.flatten().tolist()):
            if e >= 0:
                self.pairs.setdefault(e, []).append(i)
        busy = {(self.layer, e) for e in self.pairs}
        hits, missing = self._sort_out()
        # Of this layer's guesses those are left that were wrong: they must not delay a read.
        self.store.drop_guesses(self.layer)
        try:
            self.begin_reads(missing)
            if meanwhile is not None:
                meanwhile()
            self.rows = self.x.repeat_interleave(k, 0)
            self.parts = torch.zeros(t * k, self.x.shape[1])
            self._compute(hits)
            while self.reads:
                read = self.next_landed(block=True)
                batch = []
                while read is not None:
                    batch.append(self.reads[read.key])
                    read = self.next_landed(block=False)
                self._compute([(r.key[1], r.slot) for r in batch])
                for r in batch:
                    del self.reads[r.key]
                    self.store.meters.evictions += self.store.ram.keep(r.key, r.slot, busy)
                self.begin_reads(missing)
        finally:
            self.abandon()
        return self._combined()

    def _sort_out(self) -> tuple[list[tuple[int, int]], list[Key]]:
        """([(expert, slot)] at hand, keys to read); guesses that came true are waited for."""
        store, meters = self.store, self.store.meters
        hits, missing = [], []
        for e in sorted(self.pairs):
            key = (self.layer, e)
            slot = store.ram.touch(key)
            if slot is not None:
                hits.append((e, slot))
                meters.ram_hits += 1
            elif (read := store.claim(key)) is not None:
                self.reads[key] = read
                store.disk.hasten(read, self.landed)
                meters.staged_hits += 1
            else:
                missing.append(key)
                meters.misses += 1
        return hits, missing

    def _compute(self, batch: Collection[tuple[int, int]]) -> None:
        """Fill `parts` for the pairs of these (expert, slot)."""
        if not batch:
            return
        if self.native is None:
            for e, slot in batch:
                mine = self.pairs[e]
                self.parts[mine] = apply(self.store.ram.expert(self.layer, slot), self.rows[mine])
            return
        chosen = torch.full((len(self.rows), 1), -1, dtype=torch.int32)
        for i, (e, _) in enumerate(batch):
            chosen[self.pairs[e]] = i
        mlps, d = self.mlps(slot for _, slot in batch), self.rows.shape[1]
        self.native.call(
            "moe", mlps, len(mlps), self.rows.data_ptr(), d, len(self.rows),
            chosen.data_ptr(), None, 1, self.parts.data_ptr(), d, 1,
        )  # fmt: skip

    def _combined(self) -> torch.Tensor:
        """The weighted sum of each row's parts, experts ascending."""
        (t, k), out = self.ids.shape, torch.zeros_like(self.x)
        if self.native is None:
            for row in range(t):
                for i in range(row * k, (row + 1) * k):
                    out[row] += self.w.view(-1)[i] * self.parts[i]
            return out
        self.native.call(
            "combine", self.parts.data_ptr(), self.ids.data_ptr(), self.w.data_ptr(),
            t, k, out.shape[1], out.data_ptr(), out.shape[1],
        )  # fmt: skip
        return out


class InOrder(_Work):
    """Many rows: experts in ascending order, each read while the ones before it are computed."""

    def __init__(
        self,
        store: TieredStore,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        keep: bool,
        cancel: Callable[[], bool] | None,
    ) -> None:
        super().__init__(store, layer, x, ids, w)
        self.keep, self.cancel = keep, cancel
        self.out = torch.zeros_like(x)
        counts = torch.bincount(self.ids[self.ids >= 0].long(), minlength=store.n_experts)
        self.counts: list[int] = counts.tolist()
        self.order = [e for e, n in enumerate(self.counts) if n]
        self.ready: dict[int, int] = {}
        """Expert -> slot, of those that have landed."""
        # What a prompt reads only fills what is empty: with the experts it uses most.
        absent = [e for e in self.order if (layer, e) not in store.ram]
        absent.sort(key=lambda e: -self.counts[e])
        self.worth = set() if keep else set(absent[: max(0, store.ram.room(layer))])

    def run(self) -> torch.Tensor:
        """-> (T, D)."""
        missing = self._sort_out()
        done, ring = 0, self.store.ram.ring_slots
        # Whoever is asked whether to stop may step through the tiers meanwhile: half is theirs.
        most = ring if self.cancel is None else ring // 2
        try:
            while done < len(self.order):
                self.begin_reads(missing, most)
                if self._others_stepped():
                    missing = self._absent(self.order[done:])
                if missing and missing[0][1] == self.order[done]:
                    self._begin_next(missing, most)
                batch = self._next_batch(done)
                self._compute(batch)
                done += len(batch)
                for e, _ in batch:
                    self._used(e, self.order[done:])
        finally:
            self.abandon()
        return self.out

    def _sort_out(self) -> list[Key]:
        store, meters, missing = self.store, self.store.meters, list[Key]()
        for e in self.order:
            key = (self.layer, e)
            held = store.ram.touch(key) if self.keep else store.ram.slot(key)
            if held is not None:
                meters.ram_hits += self.keep
            elif (read := store.claim(key)) is not None:
                self.reads[key] = read
                store.disk.hasten(read, self.landed)
                meters.staged_hits += self.keep
            else:
                missing.append(key)
                meters.misses += self.keep
        return missing

    def _others_stepped(self) -> bool:
        """Ask whether to stop; whether there were other steps meanwhile."""
        if self.cancel is None:
            return False
        steps = self.store.meters.steps
        if self.cancel():
            raise CancelledError("stopped while reading the prompt", hint="ask again to start over")
        return self.store.meters.steps != steps

    def _begin_next(self, missing: list[Key], most: int) -> None:
        """Read what is wanted next; reads for later experts give way where the ring is too small.

        They may have been begun before: on a guess, or before others pushed this one out.
        """
        store, later = self.store, sorted(self.reads)
        while (full := len(self.reads) >= most) or (slot := store.borrow()) is None:
            if not (full or later):
                slot = store.free_slot()
                break
            key = later.pop()
            self.ready.pop(key[1], None)
            read = self.reads.pop(key)
            read.listener = None
            store.discard(read)
            missing.append(key)
            store.wait_for_orphans()
        self._begin(missing.pop(0), slot)
        missing.sort()

    def _absent(self, experts: list[int]) -> list[Key]:
        """Those that somebody else's step has pushed out, or has not brought."""
        keys = [(self.layer, e) for e in experts]
        return [k for k in keys if k not in self.reads and k not in self.store.ram]

    def _slot(self, e: int, *, block: bool) -> int | None:
        """Where the expert lies; None if it has not landed and we may not wait."""
        key = (self.layer, e)
        if key not in self.reads:  # one that was begun is used, even if another step was faster
            return self.store.ram.slot(key)
        while e not in self.ready:
            read = self.next_landed(block=block)
            if read is None:
                return None
            if self.reads.get(read.key) is read:  # else it had to give way after it landed
                self.ready[read.key[1]] = read.slot
        return self.ready[e]

    def _next_batch(self, done: int) -> list[tuple[int, int]]:
        """The next experts that are at hand, at least one, and the slots they lie in."""
        batch, pairs = list[tuple[int, int]](), 0
        for e in self.order[done:]:
            if batch and pairs + self.counts[e] > BATCH_PAIRS:
                break
            slot = self._slot(e, block=not batch)
            if slot is None:
                break
            batch.append((e, slot))
            pairs += self.counts[e]
        return batch

    def _compute(self, batch: list[tuple[int, int]]) -> None:
        """Add these experts' share to `out`."""
        if self.native is None:
            for e, slot in batch:
                rows, column = (self.ids == e).nonzero(as_tuple=True)
                y = apply(self.store.ram.expert(self.layer, slot), self.x[rows])
                self.out.index_add_(0, rows, y.mul_(self.w[rows, column, None]))
            return
        numbers = torch.full((self.store.n_experts + 1,), -1, dtype=torch.int32)
        for i, (e, _) in enumerate(batch):
            numbers[e] = i
        chosen = numbers[self.ids.long()]  # -1, "nobody", finds the last entry
        mlps, (t, d) = self.mlps(slot for _, slot in batch), self.x.shape
        self.native.call(
            "moe", mlps, len(mlps), self.x.data_ptr(), d, t, chosen.data_ptr(),
            self.w.data_ptr(), chosen.shape[1], self.out.data_ptr(), d, 1,
        )  # fmt: skip

    def _used(self, e: int, later: Collection[int]) -> None:
        """A read expert has been computed: it stays if it may, else its slot is free."""
        key, store = (self.layer, e), self.store
        if self.ready.pop(e, None) is None:
            return
        read = self.reads.pop(key)
        worth = e in self.worth and store.ram.room(self.layer) > 0
        if (self.keep or worth) and key not in store.ram:
            busy = {(self.layer, other) for other in later} if self.keep else ()
            store.meters.evictions += store.ram.keep(key, read.slot, busy)
        else:
            store.ram.give_back(read.slot)
