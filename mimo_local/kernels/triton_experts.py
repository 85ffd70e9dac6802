"""All experts of a step that lie in VRAM, for few rows, by two kernels instead of eight for each.

A (row, expert) pair is a product of one row, whatever else the step has: a row's result is the same
bits in any company, and codes that several rows want come from the card's cache after the first.
For 4-bit experts (NF4) as `experts.slots` lays them out; needs Triton like `triton_w8`. Its twin is
the tier's own way, one expert after the other through bitsandbytes. Knows bytes, no model. Called
by `experts.vram`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

from mimo_local.kernels import triton_w8

if TYPE_CHECKING:
    import torch

ROWS: Final = 4
"""Rows of a matrix that a program makes: 512 programs for each pair of the real model."""
GROUPS: Final = 16
"""Groups of 64 weights it reads at a time: 2 KB, 16 bytes to a thread."""
WARPS: Final = 4
_STEP: Final = 64 * GROUPS


class Places(NamedTuple):
    """First bytes of an expert's parts in its slot; scales are float32."""

    gate_codes: int
    gate_scales: int
    up_codes: int
    up_scales: int
    down_codes: int
    down_scales: int


def fits(narrow: int, wide: int) -> bool:
    """Whether the kernels are made for experts of this size."""
    return narrow % _STEP == 0 == wide % _STEP


def available(device: torch.device) -> bool:
    """Whether `run` works there; the first call compiles and tries it."""
    return why_unavailable(device) == ""


def why_unavailable(device: torch.device) -> str:
    """What is missing for `run`, "" if nothing."""
    return triton_w8.why_unavailable(device) or _trouble(device.index or 0)


@functools.cache
def _trouble(index: int) -> str:
    import torch

    try:
        return _trial(torch.device("cuda", index))
    except Exception as error:  # as in `triton_w8`
        first = str(error).strip().splitlines()
        return f"Triton fails: {first[0] if first else type(error).__name__}"


def _trial(device: torch.device) -> str:
    """Weights that are all 1 or all 0, so that sums are known: one expert here, another not."""
    import torch

    wide = narrow = _STEP
    codes, scales = wide * narrow // 2, wide * narrow // 64 * 4
    places = Places(0, 3 * codes, codes, 3 * codes + scales, 2 * codes, 3 * codes + 2 * scales)
    slots = torch.full((2, 3 * (codes + scales)), 0xFF, dtype=torch.uint8, device=device)
    slots[:, 3 * codes :].view(torch.float32).fill_(1 / 1024)
    slots[0, : 3 * codes] = 0x77  # code 7 is 0
    x = torch.ones((2, wide), dtype=torch.bfloat16, device=device)
    pairs = torch.tensor([1, 0, -1, 1], dtype=torch.int32, device=device)
    shares = torch.tensor([0.5, 9.0, 9.0, 2.0], device=device)
    table = torch.linspace(-1, 1, 16, device=device)
    table[7] = 0
    found = run(x, pairs, shares, slots, table, places, narrow)
    one = 1 / (1 + torch.exp(torch.tensor(-1.0)))  # silu(1) * 1, and the sum of 1024 / 1024 of it
    wanted = torch.stack((0.5 * one, 2.0 * one))[:, None].expand(2, wide)
    error = float((found.cpu() - wanted).abs().max())
    return "" if error < 1e-2 else "its results are wrong on this card"


def run(
    x: torch.Tensor,
    pairs: torch.Tensor,
    shares: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    places: Places,
    narrow: int,
) -> torch.Tensor:
    """x (T, D) bfloat16 -> (T, D) float32: by row, the sum of share * expert(x) over its pairs.

    pairs (T * K,) int32: the expert's row of `slots` (count, bytes) uint8, -1 for one that is not
    here; shares (T * K,) float32; table (16,) float32: what the codes mean. All on one device.
    """
    import torch

    from mimo_local.kernels import triton_experts_kernel as kernels

    (n, wide), k = x.shape, pairs.numel() // x.shape[0]
    apart = x.view(n, wide // 2, 2).permute(2, 0, 1).contiguous()
    hidden = x.new_empty((n * k, narrow))
    y = torch.empty((n, wide), dtype=torch.float32, device=x.device)
    size = slots.stride(0)
    shape = {"K": k, "WIDE": wide, "NARROW": narrow, "BN": ROWS, "NB": GROUPS}
    kernels.gate_up[(narrow // ROWS, n * k)](
        apart, pairs, slots, table, hidden, size, *places[:4], n * wide // 2,
        **shape, num_warps=WARPS,
    )  # fmt: skip
    kernels.down[(wide // ROWS, n)](
        hidden, pairs, shares, slots, table, y, size, *places[4:], **shape, num_warps=WARPS
    )
    return y
