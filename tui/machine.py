"""Memory this process and the machine use now; reads, decides nothing.

Called by the bridge in a thread of its own: asking a GPU may take a tenth of a second.
"""

from __future__ import annotations

from mimo_local import hardware
from tui.messages import Machine


class Gauge:
    """Asked again and again; a machine without a GPU is asked for it once."""

    def __init__(self) -> None:
        self._gpu = True

    def read(self) -> Machine:
        """The figures of this moment."""
        import psutil

        memory = psutil.virtual_memory()
        limit, free = hardware.cgroup_memory()
        total, available = memory.total, memory.available
        if limit is not None and limit < total:
            total, available = limit, min(available, free)
        used = vram = 0
        if self._gpu:
            found = hardware.gpus()
            self._gpu = bool(found)
            vram = sum(g.vram_total for g in found)
            used = vram - sum(g.vram_free for g in found)
        process = psutil.Process().memory_info().rss
        return Machine(process, max(0, total - available), total, used, vram)
