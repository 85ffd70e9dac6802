"""The stand-in accelerator of tests/sim/simdev.cpp as torch's device "sim", compiled once.

`load()` registers it in this process, for good; tests that need it run in a process of their own.
"""

from __future__ import annotations

import ctypes
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from built import built

SOURCE = Path(__file__).with_name("sim") / "simdev.cpp"


@dataclass(frozen=True)
class Counters:
    """What the device has seen: host synchronisations, copies, and bytes it holds."""

    syncs: int
    h2d: int
    d2h: int
    unpinned: int
    live: int
    peak: int


class Sim:
    """The library's own functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def counters(self) -> Counters:
        values = (ctypes.c_int64 * 6)()
        self._library.sim_counters(values)
        return Counters(*values)

    def limit(self, nbytes: int) -> None:
        """Bytes of device memory there are; 0: as many as asked for."""
        self._library.sim_limit(ctypes.c_int64(nbytes))


def build() -> Path:
    """The shared library, compiled if this torch has none yet (20 s)."""
    return built("simdev", SOURCE.read_text(), "c10", "torch_cpu")


def load() -> Sim:
    """Register device "sim" in this process."""
    library = ctypes.CDLL(str(build()))
    library.sim_register()
    torch.utils.rename_privateuse1_backend("sim")
    module = types.ModuleType("sim")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    torch._register_device_module("sim", module)
    return Sim(library)
