"""What this machine can do at best: read memory, multiply, read its disk. The yardstick of a bench.

Measured with the native kernels' own instruction set, by loops that do nothing else; without the
library by what the standard library and torch have. Knows no model. Called by `shape_bench`.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path
from typing import Final

from mimo_local import hardware, kernels
from quant.buffers import huge_empty

STREAMS: Final = (1, 4, 8, 16)
PROBE: Final = 2 << 30
"""Bytes read to measure memory: a multiple of the largest caches there are (a few hundred MB)."""
_SECTIONS: Final = 4  # parts of the probe; a single sample reads one, the next one another
_UNIT: Final = 1 << 20


class Memory:
    """A piece of memory much larger than the caches, read to learn how fast that goes."""

    def __init__(self, nbytes: int = PROBE) -> None:
        """`nbytes` in steps of 4 MiB, on huge pages where the system gives them."""
        self.nbytes = max(1, nbytes // (_SECTIONS * _UNIT)) * _SECTIONS * _UNIT
        self.streams = STREAMS[-1]
        self.samples: list[float] = []
        """Every single sample since `choose`, GB/s."""
        self._next = 0
        self._native = kernels.get()
        if self._native is None:
            return
        # The limit is to be the memory's, not that of walking page tables.
        self._block = huge_empty(self.nbytes)
        self._address = self._block.data_ptr()
        # Untouched pages are all the one zero page, which sits in the cache.
        ctypes.memset(self._address, 1, self.nbytes)

    def choose(self, reps: int = 5) -> dict[int, float]:
        """Median GB/s by number of streams; the best number is used from now on."""
        seen: dict[int, list[float]] = {streams: [] for streams in STREAMS}
        for _ in range(reps):
            for streams in STREAMS:
                seen[streams].append(self._read(streams))
        medians = {streams: statistics.median(rates) for streams, rates in seen.items()}
        self.streams = max(medians, key=lambda streams: medians[streams])
        self.samples = list(seen[self.streams])
        return medians

    def sample(self) -> float:
        """GB/s of one quarter, read once with the threads the kernels have now."""
        rate = self._read(self.streams)
        self.samples.append(rate)
        return rate

    def _read(self, streams: int) -> float:
        if self._native is None:
            rate, seconds = 0.0, 0.05
            while rate <= 0:  # on a busy machine the threads may start when the time is over
                rate, seconds = hardware.measure_ram(seconds).bytes_per_s / 1e9, 2 * seconds
            return rate
        part = self.nbytes // _SECTIONS
        took = ctypes.c_double()
        start = self._address + part * (self._next % _SECTIONS)
        self._next += 1
        self._native.call("read_limit", start, part, streams, ctypes.byref(took))
        return part / took.value / 1e9


def products(milliseconds: int = 50) -> float:
    """10^12 operations a second (two per multiply-add) by the multiply-adds of prefill."""
    native = kernels.get()
    if native is None:
        return _torch_products(milliseconds)
    operations, seconds = ctypes.c_double(), ctypes.c_double()
    references = ctypes.byref(operations), ctypes.byref(seconds)
    native.call("product_limit", milliseconds, *references)
    return operations.value / seconds.value / 1e12


def _torch_products(milliseconds: int) -> float:
    import torch

    a = torch.ones((512, 512))
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 1e-3 * milliseconds or not done:
        torch.mm(a, a)
        done += 1
    return done * 2 * 512**3 / passed / 1e12 if passed > 0 else 0.0


def disk(folder: Path, seconds: float = 1.0) -> tuple[float | None, str]:
    """(GB/s of direct reads from `folder`'s file system, a remark); None where it cannot be read.

    The folder is made if need be; a file of up to 256 MiB is written there and removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        speed = hardware.measure_disk(folder, seconds)
    except OSError as error:
        return None, f"not measured: {error.strerror or error}"
    return speed.bytes_per_s / 1e9, speed.note
