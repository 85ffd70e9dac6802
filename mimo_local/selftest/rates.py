"""How fast bytes go to a device, back, and within it. Called by `run`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mimo_local.device import host_buffer
from mimo_local.selftest.types import Result, Sizes, timed
from mimo_local.sizes import GB


def copies(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Pinned and pageable copies both ways, and a copy within the device's memory."""
    n = sizes.copied
    there = torch.empty((n,), dtype=torch.uint8, device=device)
    pinned = host_buffer((n,), torch.uint8, device)
    pinned.copy_(torch.arange(n, dtype=torch.int64).to(torch.uint8))
    back = host_buffer((n,), torch.uint8, device)
    moves = {
        "to the device": lambda: there.copy_(pinned, non_blocking=True),
        "from the device": lambda: back.copy_(there, non_blocking=True),
    }
    for name, move in moves.items():
        rate = n / timed([move], device, sizes.seconds)
        yield Result("copies", f"pinned, {name}", None, f"{rate / GB:.1f} GB/s")
    same = torch.equal(pinned, back)
    yield Result("copies", "bytes come back as they went", same, "yes" if same else "no", "yes")
    plain = torch.zeros((n,), dtype=torch.uint8)
    rate = n / timed([lambda: there.copy_(plain)], device, sizes.seconds)
    yield Result("copies", "pageable, to the device", None, f"{rate / GB:.1f} GB/s")
    other = torch.empty_like(there)
    rate = 2 * n / timed([lambda: other.copy_(there)], device, sizes.seconds)
    yield Result("copies", "device memory, read and written", None, f"{rate / GB:.0f} GB/s")
