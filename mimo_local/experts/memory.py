"""How much memory this process may still take, and the refusal to load what does not fit."""

from __future__ import annotations

from typing import Final

import psutil

from mimo_local import hardware
from mimo_local.errors import NotEnoughMemoryError

MOST_RESERVE: Final = 8_000_000_000


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its cgroup's if that is less."""
    return min(int(psutil.virtual_memory().available), hardware.cgroup_memory()[1])


def reserve() -> int:
    """Bytes left to the system and other programs: an eighth of the memory, at most 8 GB."""
    total, limit = int(psutil.virtual_memory().total), hardware.cgroup_memory()[0]
    return min(total if limit is None else min(total, limit), 8 * MOST_RESERVE) // 8


def check_memory(nbytes: int) -> None:
    """Refuse to load `nbytes` that do not fit; raises NotEnoughMemoryError."""
    free = available_memory()
    if nbytes > free:
        raise NotEnoughMemoryError(
            f"the model takes {nbytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            f"{(nbytes - free) / 1e9:.1f} GB are missing",
            hint="close other programs, choose a smaller format (`mimo quantize --format nf4`), "
            "or see `mimo plan`",
        )
