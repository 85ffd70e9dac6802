"""Few rows times an 8-bit matrix on a CUDA card: the codes are read once and never widened.

torch's way writes the matrix in bfloat16 first and reads that, five times the bytes. Needs Triton,
which torch brings along on Linux, and for its first use a C compiler; `available` tries it once and
`why_unavailable` says what was missing, for `mimo doctor`. Where it is not there, and for more than
ROWS rows, the twin is torch's product (`quant.on_device`). Knows no format and no model. Imports
neither torch nor Triton before it is asked. Called by `quant.on_device`.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import torch

ROWS: Final = 16
"""At most: one tile of the tensor cores. A row's result is the same bits in any company."""


class Tile(NamedTuple):
    """What a program of the kernel makes, and how far ahead it reads."""

    rows: int
    """Of the matrix: columns of y."""
    cols: int
    """Read at a time."""
    warps: int
    stages: int


_WIDE: Final = Tile(32, 128, warps=4, stages=4)  # 24 KB of shared memory: four to a multiprocessor
_DEEP: Final = Tile(32, 256, warps=4, stages=4)  # 48 KB
_FEW: Final = 8192


def tile(rows: int) -> Tile:
    """The tile for a matrix of so many rows; sums are in the same order in all of them.

    A card has 128 multiprocessors or fewer: with at most two programs for each, each has to keep
    more bytes on their way, 24 KB instead of 12.
    """
    return _DEEP if rows <= _FEW else _WIDE


def available(device: torch.device) -> bool:
    """Whether `product` works there; the first call compiles and tries it (a second or two)."""
    return why_unavailable(device) == ""


def why_unavailable(device: torch.device) -> str:
    """What is missing for `product`, "" if nothing."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    return _trouble(device.index or 0)


@functools.cache
def _trouble(index: int) -> str:
    import torch

    if torch.version.hip is not None:
        return "it is not tried on AMD cards"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (torch brings it along on Linux)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return (
            f"the card's compute capability {major}.{minor} is below 8.0: no bfloat16 in hardware"
        )
    try:
        return _trial(torch.device("cuda", index))
    except Exception as error:  # a missing compiler, header or driver, each with its own class
        first = str(error).strip().splitlines()
        return f"Triton fails: {first[0] if first else type(error).__name__}"


def _trial(device: torch.device) -> str:
    """Both tiles on numbers that have to come out exactly."""
    import torch

    for rows in (64, _FEW + 32):
        codes = (torch.arange(rows * 256, device=device) % 253 - 126).to(torch.int8).view(rows, 256)
        x = torch.zeros((2, 256), dtype=torch.bfloat16, device=device)
        x[0, 3], x[1, 250] = 1.0, -2.0
        found = product(x, codes, torch.full((rows,), 0.5, device=device))
        wanted = torch.stack((codes[:, 3] * 0.5, codes[:, 250] * -1.0)).to(x.dtype)
        if not torch.equal(found, wanted):
            return "its results are wrong on this card"
    return ""


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (T, K) bfloat16, codes (N, K) int8, scales (N,) float32 -> (T, N) bfloat16; T <= ROWS."""
    from mimo_local.kernels.triton_w8_kernel import w8a16

    (m, k), n = x.shape, codes.shape[0]
    assert m <= ROWS
    assert codes.shape[1] == k
    assert codes.is_contiguous()
    y = x.new_empty((m, n))
    if m == 0:
        return y
    t = tile(n)
    w8a16[(-(-n // t.rows),)](
        x.contiguous(), codes, scales, y, m, n, k,
        BM=ROWS, BN=t.rows, BK=t.cols, EVEN=k % t.cols == 0,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return y
