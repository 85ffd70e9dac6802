"""The RAM tier: slots for experts within a byte budget, and a ring of slots for those on their way.

Every read lands in a ring slot. A slot whose expert is to stay changes places with the victim's, so
that nothing is copied and reads that are not worth keeping (long prompts, wrong guesses) never push
anything out. Knows slots and keys, no files; who stays is `policy`'s to say. Called by `tiered`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Final

import torch

from mimo_local import kernels
from mimo_local.errors import NotEnoughMemoryError
from mimo_local.experts.arena import Arena
from mimo_local.experts.policy import ExpertPolicy, Key, Lru
from mimo_local.sizes import gb
from mimo_local.weights import EXPERT_PARTS, Expert, QuantLinear
from quant.formats import get_format
from quant.layout import ExpertLayout
from quant.pack import expert_views

MAX_SLOTS: Final = 1 << 20


class RamTier:
    """Experts in memory: `capacity` of them kept, `ring` more while they are read and used once."""

    def __init__(
        self,
        layouts: dict[int, ExpertLayout],
        budget: int,
        *,
        ring: int,
        policy: Callable[[int], ExpertPolicy] = Lru,
    ) -> None:
        """`budget`: bytes, never exceeded; NotEnoughMemoryError if the ring alone is more."""
        self.layouts = layouts
        stride = max(x.stride for x in layouts.values())
        experts = sum(x.count for x in layouts.values())
        probe = Arena(0, stride)
        self.slot_bytes = probe.slot_bytes
        slots = min(budget // self.slot_bytes, experts + ring, MAX_SLOTS)
        if slots < ring:
            need = ring * self.slot_bytes
            raise NotEnoughMemoryError(
                f"experts read from disk need {gb(need)} of memory at least, {gb(budget)} are left",
                hint="close other programs, use a smaller --context, or give more with `--ram`",
            )
        self.arena = Arena(slots, stride)
        self.budget = budget
        self.ring_slots = ring
        self.policy = policy(slots - ring)
        self._slot: dict[Key, int] = {}
        self._held: Counter[int] = Counter()  # by layer
        self._ring = list(range(ring))
        self._free = list(range(slots - 1, ring - 1, -1))  # may be used; popped from the end
        self._shut: list[int] = []  # beyond the present budget, without pages
        self._mlps: dict[tuple[int, int], kernels.Mlp] = {}  # (layer, slot)

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Experts that may stay."""
        return self.policy.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, ring included: what the tier takes at most right now."""
        return (len(self._slot) + self.ring_slots) * self.slot_bytes

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def __iter__(self) -> Iterator[Key]:
        return iter(self._slot)

    def slot(self, key: Key) -> int | None:
        """The slot that holds `key`, without a trace in its recency."""
        return self._slot.get(key)

    def touch(self, key: Key) -> int | None:
        """The slot that holds `key`, which has just been wanted; None: it is not here."""
        return self._slot[key] if self.policy.touch(key) else None

    # ---- slots on their way ----------------------------------------------------------------------

    @property
    def ring_left(self) -> int:
        """Ring slots nobody uses."""
        return len(self._ring)

    def borrow(self) -> int:
        """A ring slot to read into."""
        slot = self._ring.pop()
        self.arena.populate(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """A borrowed slot whose content nobody needs any more."""
        self._ring.append(slot)

    def keep(self, key: Key, slot: int, busy: Container[Key] = ()) -> bool:
        """A borrowed slot's expert stays, and another slot takes its place in the ring.

        False: nothing could be evicted (no capacity, or all of it `busy`); the slot went back.
        """
        try:
            victim = self.policy.insert(key, busy)
        except ValueError:
            self.give_back(slot)
            return False
        freed = self._free.pop() if victim is None else self._leave(victim)
        self._slot[key] = slot
        self._held[key[0]] += 1
        self._ring.append(freed)
        return victim is not None

    def room(self, layer: int) -> int:
        """Experts of the layer that may stay within its equal share, pushing none out."""
        return min(len(self._free), self.capacity // len(self.layouts) - self._held[layer])

    def _leave(self, key: Key) -> int:
        self._held[key[0]] -= 1
        return self._slot.pop(key)

    # ---- the budget ------------------------------------------------------------------------------

    def resize(self, budget: int, busy: Container[Key] = ()) -> int:
        """Change the budget, at most to what was given at first; returns experts evicted."""
        allowed = min(max(budget // self.slot_bytes, self.ring_slots), self.arena.count)
        target = allowed - self.ring_slots
        self.budget = budget
        before = len(self._slot)
        for key in self.policy.resize(target, busy):
            self._free.append(self._leave(key))
        surplus = len(self._slot) + len(self._free) - target
        for _ in range(min(surplus, len(self._free))):
            slot = self._free.pop()
            self.arena.release(slot)
            self._shut.append(slot)
        for _ in range(-surplus):
            self._free.append(self._shut.pop())
        return before - len(self._slot)

    # ---- for those who compute -------------------------------------------------------------------

    def mlp(self, layer: int, slot: int) -> kernels.Mlp:
        """Addresses of the expert of `layer` that lies in `slot`."""
        found = self._mlps.get((layer, slot))
        if found is None:
            found = self._mlps[layer, slot] = kernels.Mlp()
            expert = self.expert(layer, slot)
            for name in ("gate", "up", "down"):
                setattr(found, name, getattr(expert, name).matrix())
        return found

    def expert(self, layer: int, slot: int) -> Expert:
        """The expert of `layer` that lies in `slot`, as tensors over its bytes."""
        layout = self.layouts[layer]
        buffer = torch.frombuffer(self.arena.view(slot), dtype=torch.uint8)
        views = expert_views(buffer[: layout.stride], layout)
        fmt = get_format(layout.format)
        linears = []
        for part in EXPERT_PARTS:
            name = next(iter(views[part]))
            rows = views[part][name].shape[0]
            linears.append(QuantLinear(fmt, views[part], rows, _columns(layout, part)))
        return Expert(*linears)


def _columns(layout: ExpertLayout, part: str) -> int:
    """Columns of one matrix: the rows of the others (gate, up: (I, D); down: (D, I))."""
    other = "gate_proj" if part == "down_proj" else "down_proj"
    return next(shape[0] for name, (_, shape, _) in layout.parts.items() if name.startswith(other))
