"""Memory for weights: large buffers on huge pages, so that streaming them waits for no page tables.

One function for whoever holds weights: packs read into it, stacked matrices and random weights are
made in it, tiers of experts cut their arenas from it. Knows bytes only.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch

HUGE = 2 << 20
PAGE = 4096
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def huge_empty(nbytes: int) -> torch.Tensor:
    """uint8 (nbytes,) of unspecified content, freed when the last view of it goes.

    From 2 MiB on it begins at a multiple of 2 MiB and all its whole 2 MiB are huge pages where the
    system gives them; the rest, and anything smaller, begins at a multiple of 4096 on small pages.
    Each large buffer is a mapping of its own: cut many small ones from one arena. Pages are taken
    when they are first touched. Raises MemoryError.
    """
    if nbytes < HUGE or _ADVICE is None:
        return _aligned(torch.empty(nbytes + PAGE, dtype=torch.uint8), PAGE, nbytes)
    try:
        # Private: pages of shared mappings follow another switch, which is off nearly everywhere.
        area = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:
        raise MemoryError(f"no {nbytes} bytes of memory for weights: {e.strerror}") from e
    whole = torch.frombuffer(area, dtype=torch.uint8)
    skip = -whole.data_ptr() % HUGE
    with suppress(OSError):  # a kernel built without them
        # The last part of a page is left out: a huge one would cost memory nobody uses.
        area.madvise(_ADVICE, skip, nbytes // HUGE * HUGE)
    return whole[skip : skip + nbytes]


def huge_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty(shape, dtype=dtype)` in `huge_empty`'s memory where it is large."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE:
        return torch.empty(shape, dtype=dtype)
    return huge_empty(nbytes).view(dtype).view(shape)


def _aligned(raw: torch.Tensor, unit: int, nbytes: int) -> torch.Tensor:
    skip = -raw.data_ptr() % unit
    return raw[skip : skip + nbytes]
