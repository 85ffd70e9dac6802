"""What the tiers did: plain counters, and a copy of them for whoever shows them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from mimo_local.events import ExpertFigures

if TYPE_CHECKING:
    from mimo_local.experts.store import Store


@dataclass(slots=True)
class Meters:
    """Counted since the store was made. "Wanted" = distinct experts asked for by a layer's step."""

    steps: int = 0
    """Layer steps run from the tiers (decode, verify, short prompts)."""
    vram_hits: int = 0
    ram_hits: int = 0
    staged_hits: int = 0
    """Wanted experts that a prefetch had read or was reading."""
    misses: int = 0
    """Wanted experts that had to be read."""
    disk_bytes: int = 0
    """Read from disk for all purposes: misses, prefetches, sweeps."""
    sweep_bytes: int = 0
    """Of these for sweeps (long prompts)."""
    prefetched: int = 0
    prefetch_wasted: int = 0
    """Prefetched experts nobody asked for."""
    wait_s: float = 0.0
    """Seconds a step waited for the disk with nothing else to do."""
    evictions: int = 0
    uploads: int = 0
    """Experts copied to VRAM."""

    def copy(self) -> Meters:
        """The counters as they are now."""
        return Meters(**{f.name: getattr(self, f.name) for f in fields(self)})

    def since(self, before: Meters) -> Meters:
        """What was added after `before`."""
        return Meters(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )

    @property
    def wanted(self) -> int:
        """Experts asked for, from wherever they came."""
        return self.vram_hits + self.ram_hits + self.staged_hits + self.misses


def figures(store: Store, before: Meters | None) -> ExpertFigures | None:
    """What `store` did since `before`, for people; None where all experts lie in RAM."""
    held = store.nbytes
    if "disk" not in held or before is None:
        return None
    used = store.meters.since(before)
    return ExpertFigures(
        wanted=used.wanted,
        vram_hits=used.vram_hits,
        ram_hits=used.ram_hits,
        staged_hits=used.staged_hits,
        misses=used.misses,
        disk_bytes=used.disk_bytes,
        prompt_disk_bytes=used.sweep_bytes,
        wait_s=used.wait_s,
        ram_bytes=held.get("ram", 0),
        vram_bytes=held.get("vram", 0),
        prefetching=store.wants_guesses,
        note="; ".join(store.notes),
    )
