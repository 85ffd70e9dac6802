"""How much memory this process may still take, and the refusal to load what does not fit."""

from __future__ import annotations

import psutil

from mimo_local import hardware
from mimo_local.errors import NotEnoughMemoryError


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its cgroup's if that is less."""
    return min(int(psutil.virtual_memory().available), hardware.cgroup_memory()[1])


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
