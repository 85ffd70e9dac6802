"""The VRAM tier: the experts wanted most, on a device, multiplied there beside the CPU's share.

Who comes in is `policy.AgedFrequency`'s to say, and slowly: a copy takes the bus from everybody.
Results differ from the CPU's in the last digits, because activations are rounded otherwise. Runs on
any torch device, the CPU included. Called by `device_store`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from mimo_local.device import Mark, Stream, host_buffer
from mimo_local.experts.policy import AgedFrequency, Key
from mimo_local.experts.slots import SlotLayout
from mimo_local.kernels import triton_experts
from mimo_local.weights import Expert
from quant.formats import NF4_CODES, Parts
from quant.layout import ExpertLayout
from quant.on_device import activations

PER_LAYER: Final = 1
"""Uploads of a layer's experts in a step at most: 14 MB take 0.6 ms of a 25 GB/s bus."""
STAGING: Final = 2
"""Host buffers that copies go through: one is filled while the other is on the bus."""
HALF_LIFE: Final = 32.0
"""Steps after which a touch counts half: by replay as good as recency with a fifteenth of the
uploads (bench/routing_policies.py)."""


class VramTier:
    """Slots on a device; each holds one expert."""

    def __init__(
        self, layouts: Mapping[int, ExpertLayout], budget: int, device: torch.device | str
    ) -> None:
        """`layouts`: by layer; `budget`: bytes of device memory."""
        self.device = torch.device(device)
        self.dtype = activations(self.device)
        self.layouts = {n: SlotLayout.of(layout, self.device) for n, layout in layouts.items()}
        self.slot_bytes = max(layout.nbytes for layout in self.layouts.values())
        count = max(0, min(budget // self.slot_bytes, sum(x.count for x in layouts.values())))
        self.policy = AgedFrequency(count, half_life=HALF_LIFE, margin=1.25, per_layer=PER_LAYER)
        self._slots = torch.empty((count, self.slot_bytes), dtype=torch.uint8, device=self.device)
        self._slot: dict[Key, int] = {}
        self._views: list[dict[str, Parts]] = [{} for _ in range(count)]
        self._free = list(range(count - 1, -1, -1))
        self._arrived = [Mark(self.device) for _ in range(count)]
        self._used = [Mark(self.device) for _ in range(count)]
        for mark in self._used:  # this memory may be what work already queued still reads
            mark.set()
        self._copies, self._compute = Stream(self.device), Stream(self.device, current=True)
        self._staging = [_Staging(self.slot_bytes, self.device) for _ in range(min(STAGING, count))]
        self._turn = self._turn_pairs = 0
        self._pairs = [_Pairs(self.device), _Pairs(self.device)]
        self._table = torch.tensor(NF4_CODES, dtype=torch.float32, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the slots take."""
        return self._slots.nbytes

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def touch(self, key: Key) -> bool:
        """Whether the expert is here; counts towards coming in if it is not."""
        return self.policy.touch(key)

    def consider(self, key: Key, expert: Expert, busy: Sequence[Key] = ()) -> bool:
        """Take in an expert that lies in RAM, if it has earned it; whether it was taken."""
        if key in self._slot or not self._staging or not self.policy.admits(key, busy):
            return False
        try:
            victim = self.policy.insert(key, busy)
        except ValueError:
            return False
        slot = self._free.pop() if victim is None else self._slot.pop(victim)
        self._upload(slot, self.layouts[key[0]], expert)
        self._slot[key] = slot
        return True

    def end_of_step(self) -> None:
        """All layers of a step have been run."""
        self.policy.end_of_step()

    def run(self, key: Key, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) on the device -> what an expert that is here makes of it, as the work is queued.

        Both in the device's dtype of activations; nothing waits.
        """
        slot = self._slot[key]
        self._arrived[slot].hold(self._compute)
        y = self.layouts[key[0]].run(self._views[slot], x)
        self._used[slot].set()
        return y

    def together(
        self, layer: int, x: torch.Tensor, numbers: Sequence[Sequence[int]], w: torch.Tensor
    ) -> torch.Tensor | None:
        """x (T, D), chosen experts by row, w (T, K) f32 -> the weighted sum of those here, (T, D).

        All of them by two kernels, as the work is queued; None where there are none for that.
        """
        layout = self.layouts[layer]
        if layout.format != "nf4" or not triton_experts.fits(layout.narrow, layout.wide):
            return None
        if not triton_experts.available(self.device):
            return None
        found = [self._slot.get((layer, e), -1) for row in numbers for e in row]
        slots = {slot for slot in found if slot >= 0}
        for slot in slots:
            self._arrived[slot].hold(self._compute)
        self._turn_pairs += 1
        pairs = self._pairs[self._turn_pairs % len(self._pairs)].send(found)
        y = triton_experts.run(
            x, pairs, w.reshape(-1), self._slots, self._table, layout.places, layout.narrow
        )
        for slot in slots:
            self._used[slot].set()
        return y

    def close(self) -> None:
        """Until nothing is on its way here: the memory may be given back then."""
        for mark in self._arrived:
            mark.wait()

    def _upload(self, slot: int, layout: SlotLayout, expert: Expert) -> None:
        staging = self._staging[self._turn % len(self._staging)]
        self._turn += 1
        staging.fill(layout, expert)
        self._views[slot] = layout.views(self._slots[slot])
        with self._copies.use():
            # What the device still computes from this slot comes first.
            self._used[slot].hold(self._copies)
            there = self._slots[slot, : layout.nbytes]
            there.copy_(staging.bytes[: layout.nbytes], non_blocking=True)
            self._arrived[slot].set()
            staging.sent.set()


class _Pairs:
    """Pinned memory for the slots of a step's (row, expert) pairs on their way to the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers = host_buffer((0,), torch.int32, device)
        self._sent = Mark(device)

    def send(self, slots: list[int]) -> torch.Tensor:
        """These numbers on the device, as the copy is queued."""
        self._sent.wait()
        if len(slots) > self._numbers.numel():
            self._numbers = host_buffer((len(slots),), torch.int32, self._device)
        part = self._numbers[: len(slots)].copy_(torch.tensor(slots, dtype=torch.int32))
        there = torch.empty(part.shape, dtype=torch.int32, device=self._device)
        there.copy_(part, non_blocking=True)
        self._sent.set()
        return there


class _Staging:
    """Host memory an expert is copied through."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = host_buffer((nbytes,), torch.uint8, device)
        self.sent = Mark(device)

    def fill(self, layout: SlotLayout, expert: Expert) -> None:
        """Once the last copy from here is over: this expert's bytes."""
        self.sent.wait()
        layout.fill(self.bytes, expert)
