"""FP8 as the checkpoints store it: codes to float32, and where the scale of a row is.

Pure arithmetic on tensors and row counts; knows no files and no names. Called by `checkpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quant.tensorfile import bytes_of

BLOCK = 128
"""Rows and columns of an FP8 block when config.json does not say."""


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of an FP8 matrix as stored: weight (n, k) = codes[n, k] * grid[row_of[n], k // block].

    `codes` (N, K) float8, `grid` (G, ceil(K / block)) float32, finite; `row_of` (N,) int32.
    """

    codes: torch.Tensor
    grid: torch.Tensor
    row_of: torch.Tensor
    block: int

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.codes.shape

    def values(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weights (N, K) float32, into `out` if there is one."""
        out = torch.empty(self.shape) if out is None else out
        fp8_to_f32(self.codes, out)
        per_row = self.grid[self.row_of]  # (rows, column blocks)
        whole = out.shape[1] // self.block
        if whole:
            blocks = out[:, : whole * self.block].view(-1, whole, self.block)
            blocks.mul_(per_row[:, :whole].unsqueeze(2))
        if out.shape[1] > whole * self.block:
            out[:, whole * self.block :].mul_(per_row[:, whole:])
        return out


@dataclass(frozen=True, slots=True)
class FusedGrid:
    """Where the FP8 scales of split q, k, v tensors are when they were made on a fused block.

    `counts`: scale rows in the q, k and v scale tensors. `rows`: for q, k and v, per weight row the
    index into the three scale tensors laid one after the other.
    """

    counts: tuple[int, int, int]
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fused_grid(q: int, k: int, v: int, tp: int, block: int = BLOCK) -> FusedGrid:
    """Scale layout of q, k, v weight rows quantised per tensor-parallel shard.

    Each of the `tp` shards holds [q/tp | k/tp | v/tp] rows under one grid of `block` rows; a scale
    row is stored with the tensor its block's first row belongs to, shards in order. Where q/tp and
    k/tp are no multiples of `block`, a block straddles two tensors. All rows must divide by `tp`.
    """
    parts = (q // tp, k // tp, v // tp)
    starts = (0, parts[0], parts[0] + parts[1])
    grid = torch.arange(-(-sum(parts) // block)) * block  # first row of every block of a shard
    owner = torch.bucketize(grid, torch.tensor(starts[1:]), right=True)
    own = [int((owner == i).sum()) for i in range(3)]
    counts = (own[0] * tp, own[1] * tp, own[2] * tp)
    before = (0, counts[0], counts[0] + counts[1])
    first = torch.tensor([0, own[0], own[0] + own[1]])  # first block each tensor owns
    rows = []
    for start, n in zip(starts, parts, strict=True):
        b = (start + torch.arange(n)) // block
        o = owner[b]
        within = b - first[o]
        shard = torch.arange(tp).unsqueeze(1)
        index = torch.tensor(before)[o] + shard * torch.tensor(own)[o] + within
        rows.append(index.reshape(-1))
    return FusedGrid(counts, (rows[0], rows[1], rows[2]))


def sharded_grid(
    q: int, k: int, v: int, tp: int, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row of q, k and v its row in the scale tensor of one fused qkv.

    Each of the `tp` shards, [q/tp | k/tp | v/tp] rows, has a grid of its own that begins with it.
    """
    parts = (q // tp, k // tp, v // tp)
    per_shard = -(-sum(parts) // block)
    shard = torch.arange(tp).unsqueeze(1) * per_shard
    rows, start = [], 0
    for n in parts:
        rows.append((shard + (start + torch.arange(n)) // block).reshape(-1))
        start += n
    return rows[0], rows[1], rows[2]


_PAIRS: list[np.ndarray[Any, np.dtype[np.uint64]]] = []


def fp8_to_f32(raw: torch.Tensor, out: torch.Tensor) -> None:
    """Widen FP8 values into `out` (float32, same shape, contiguous), scales not applied.

    Two codes at a time through a 65536-entry table: about 1 G weights/s on one core, where
    `Tensor.copy_` reaches 0.12 (309 G weights would take 45 minutes).
    """
    if raw.dtype != torch.float8_e4m3fn or raw.numel() % 2:
        out.copy_(raw)
        return
    if not _PAIRS:
        single = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        codes = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
        _PAIRS.append(np.ascontiguousarray(single[codes]).view(np.uint64).reshape(-1))
    pairs = np.frombuffer(bytes_of(raw), dtype=np.uint16)
    target = np.frombuffer(bytes_of(out), dtype=np.uint64)
    np.take(_PAIRS[0], pairs, out=target, mode="clip")
