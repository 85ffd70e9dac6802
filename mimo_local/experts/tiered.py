"""TieredStore: the experts of a model that does not fit into memory, in RAM as far as it goes.

A step's hits are computed at once while its misses are read; what has landed is computed as it
comes, and the results are added in the order of the experts, so that the bits of an answer do not
depend on what was where. Long prompts sweep through a layer's experts in file order. Knows slots,
reads and rows; which expert stays is `policy`'s to say. Built by `opening`, called by the model.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import torch

from mimo_local import kernels
from mimo_local.experts.disk import DiskTier, Read
from mimo_local.experts.lending import Loan
from mimo_local.experts.meters import Meters
from mimo_local.experts.policy import AgedFrequency, ExpertPolicy, Key, PerLayer
from mimo_local.experts.prefetch import Trial
from mimo_local.experts.pressure import Pressure
from mimo_local.experts.ram import RamTier
from mimo_local.experts.steps import Few, InOrder
from mimo_local.experts.store import Store
from mimo_local.settings import Prefetch
from mimo_local.weights import Expert, PackWeights

FEW_ROWS: Final = 8
"""Up to so many rows each row is computed as if it were alone (MIMO_EXACT_ROWS): in any order."""
KEEP_ROWS: Final = 64
"""Longer steps are prompts: what they read is not kept, or it would push out what answers need."""
AHEAD: Final = 4
"""Experts of the next layer that are read on a guess; more guesses are more often wrong."""


def quotas(layers: Sequence[int]) -> Callable[[int], ExpertPolicy]:
    """The RAM tier's policy: an equal share for every layer, by counts that fade within a sentence.

    Replayed (bench/routing_policies.py): recency over all layers hits nothing while the tier holds
    less than one step wants; shares cure that, and counts that halve in 8 steps are equal to or
    above recency within the shares in every case.
    """
    return partial(PerLayer, layers=layers, make=partial(AgedFrequency, half_life=8))


class TieredStore(Store):
    """What the mixture layers see when the experts do not all fit."""

    def __init__(
        self,
        weights: PackWeights,
        budget: int,
        *,
        policy: Callable[[int], ExpertPolicy] | None = None,
        prefetch: Prefetch = "auto",
        reserve: int | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        """`budget`: bytes of RAM for experts; `reserve`: bytes of the machine's left alone.
        `policy`: given a capacity, who stays in RAM; None: `quotas`.

        Reads nothing yet. `disk`: replaced in tests. Raises NotEnoughMemoryError.
        """
        config, pack = weights.config, weights.pack
        layers = [spec.index for spec in config.layers if spec.mlp == "moe"]
        layouts = {layer: pack.expert_layout(layer) for layer in layers}
        self.n_experts, self.chosen = config.n_experts, config.experts_per_token
        self.meters = Meters()
        self.disk = disk or DiskTier(pack.path, layouts)
        # Twice a token's experts: this layer's misses and guesses for the next one.
        self.ram = RamTier(layouts, budget, ring=2 * self.chosen, policy=policy or quotas(layers))
        self.pressure = Pressure(self.ram.slot_bytes, budget, reserve)
        self.trial = Trial()
        self._prefetch: Prefetch = prefetch
        self._first, self._last = layers[0], layers[-1]
        self._ahead: dict[Key, Read] = {}
        self._orphans: list[Read] = []
        self._step_s, self._step_rows = 0.0, 0
        self._stepped = 0
        """Bytes read for steps, not for sweeps."""

    # ---- what the model asks ---------------------------------------------------------------------

    @property
    def nbytes(self) -> dict[str, int]:
        """Of RAM what is in use, of the disk all experts there are."""
        return {"ram": self.ram.nbytes, "disk": self.disk.nbytes}

    @property
    def notes(self) -> list[str]:
        """Reads through the page cache; a tier that had to shrink."""
        return [*self.disk.notes, *self.pressure.notes]

    def resident(self, layer: int) -> bool:
        """Never: where an expert lies changes from step to step."""
        return False

    def mlps(self, layer: int) -> tuple[ctypes.Array[kernels.Mlp], object]:
        """Not for layers that are not resident."""
        raise ValueError(f"the experts of layer {layer} do not all lie in RAM")

    def held(self, layer: int, e: int) -> Expert | None:
        """If the RAM tier has it; it does not count as wanted."""
        slot = self.ram.slot((layer, e))
        return None if slot is None else self.ram.expert(layer, slot)

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        meanwhile: Callable[[], None] | None = None,
        guess: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The bits of `ExpertStore.run`.

        PackError if an expert cannot be read: nothing was computed from it, and the store goes on.
        """
        start, before = time.perf_counter(), self.disk.bytes_read
        if self._watcher is not None:
            self._watcher(layer, ids)
        if layer == self._first:
            self._begin_step(x.shape[0])
        self.meters.steps += 1
        x = x.contiguous()
        if guess is not None:
            meanwhile = partial(self.expect, *guess)
        try:
            if x.shape[0] <= FEW_ROWS:
                return Few(self, layer, x, ids, w).run(meanwhile)
            keep = x.shape[0] <= KEEP_ROWS
            return InOrder(self, layer, x, ids, w, keep=keep, cancel=None).run()
        finally:
            self.drop_guesses(layer)
            self.meters.disk_bytes = self.disk.bytes_read
            self._stepped += self.disk.bytes_read - before
            self._step_s += time.perf_counter() - start
            if layer == self._last:
                self._end_step(x.shape[0])

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """What it reads is not kept where it would push something out."""
        if self._watcher is not None:
            self._watcher(layer, ids)
        self._heed_pressure()  # a long prompt is one step of many seconds
        before, stepped = self.disk.bytes_read, self._stepped
        try:
            return InOrder(self, layer, x.contiguous(), ids, w, keep=False, cancel=cancel).run()
        finally:
            self.drop_guesses(layer)
            self.meters.disk_bytes = self.disk.bytes_read
            others = self._stepped - stepped
            self.meters.sweep_bytes += self.disk.bytes_read - before - others

    @property
    def lends(self) -> int:
        """Half of the ring: other steps may come between two experts."""
        return self.ram.ring_slots // 2

    def stream(
        self, layer: int, wanted: Mapping[int, int], *, held: int = 1, slots: int = 1
    ) -> Generator[tuple[int, Expert], None, None]:
        """What is read is not kept where it would push something out."""
        self._heed_pressure()
        return Loan(self, layer, wanted, held, slots).items()

    # ---- guesses ---------------------------------------------------------------------------------

    @property
    def wants_guesses(self) -> bool:
        """By the settings, or by what the last trial found."""
        return self._prefetch == "on" or (self._prefetch == "auto" and self.trial.on)

    def expect(self, layer: int, ids: torch.Tensor) -> None:
        """They are read after everything else, AHEAD at most; wrong ones are dropped."""
        self._reclaim()
        for e in dict.fromkeys(ids.flatten().tolist()):
            key = (layer, e)
            if len(self._ahead) >= AHEAD or not self.ram.ring_left:
                return
            if key in self.ram or key in self._ahead:
                continue
            slot = self.ram.borrow()
            self._ahead[key] = self.disk.read(key, slot, self.ram.arena.view(slot), urgent=False)
            self.meters.prefetched += 1

    def claim(self, key: Key) -> Read | None:
        """A read begun on a guess that came true: it belongs to the caller now."""
        return self._ahead.pop(key, None)

    def drop_guesses(self, layer: int) -> None:
        """Of the guesses for `layer` those nobody claimed: they were wrong."""
        for key in [key for key in self._ahead if key[0] == layer]:
            self.discard(self._ahead.pop(key))
            self.meters.prefetch_wasted += 1

    def discard(self, read: Read) -> None:
        """Nobody needs this read any more: its slot goes back as soon as nothing writes there."""
        if self.disk.forget(read):
            self.ram.give_back(read.slot)
        else:
            self._orphans.append(read)

    def _reclaim(self) -> None:
        for read in [read for read in self._orphans if read.landed]:
            self._orphans.remove(read)
            self.ram.give_back(read.slot)

    def borrow(self) -> int | None:
        """A ring slot, if there is one without waiting."""
        self._reclaim()
        return self.ram.borrow() if self.ram.ring_left else None

    def free_slot(self) -> int:
        """A ring slot, waiting for one if need be."""
        while (slot := self.borrow()) is None:
            if not self._orphans:  # a step that failed has left its guesses
                for layer in {key[0] for key in self._ahead}:
                    self.drop_guesses(layer)
            self.wait_for_orphans()
        return slot

    def wait_for_orphans(self) -> None:
        """Until dropped reads have landed and their slots are back in the ring."""
        self.disk.wait(self._orphans)
        self._reclaim()

    # ---- between steps ---------------------------------------------------------------------------

    def _begin_step(self, rows: int) -> None:
        self.ram.policy.end_of_step()
        self._step_s, self._step_rows = 0.0, rows
        self._heed_pressure()

    def _end_step(self, rows: int) -> None:
        # Here, because the next step's first guesses come before its first layer. A step that
        # others have stepped into took longer than it would have.
        if self._prefetch == "auto" and rows == self._step_rows <= FEW_ROWS:
            self.trial.observe(self._step_s, self._step_rows)

    def _heed_pressure(self) -> None:
        wish = self.pressure.wish()
        if wish is not None:
            self.meters.evictions += self.ram.resize(wish)

    def set_budget(self, budget: int) -> None:
        """Another number of bytes for the RAM tier from now on, at most what it began with."""
        self.pressure.budget = budget
        self.meters.evictions += self.ram.resize(budget)

    def close(self) -> None:
        """Stop reading."""
        self.disk.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.disk.close()
