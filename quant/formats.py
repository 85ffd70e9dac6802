"""How a weight matrix is stored: NF4, INT8, BF16, F32; each can pack, unpack and multiply.

The one place that chooses between the native kernel and its torch twin. Knows bytes and rows, not
what a matrix is for. Called by `convert` and `pack` (making packs) and `mimo_local.weights`
(running them). The bytes are described in docs/format.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from mimo_local import kernels
from mimo_local.errors import PackError

Parts = dict[str, torch.Tensor]
"""A stored matrix: what `Format.parts` names, as CPU tensors."""
Unpack = Callable[[Parts], torch.Tensor]
PartShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Part name -> (dtype, shape)."""

BLOCK = 64
"""NF4: weights that share one scale."""

# fmt: off
NF4_CODES: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 values of bitsandbytes' nf4 code, exact in float32."""

NATIVE_ROWS = 16
"""Up to this many rows the kernels multiply packed weights; above, unpacking once is cheaper."""

_CHUNK = 1 << 22
"""Weights a torch twin works on at once: 16 MiB in float32, so temporaries stay below ~200 MB."""

_HUNDREDTHS = (75, 78, 81, 84, 86, 88, 90, 92, 94, 96, 98, 102, 104, 106, 108, 110)
_NF4_FACTORS = tuple(n / 100 for n in _HUNDREDTHS)
_INT8_FACTORS = tuple(n / 100 for n in range(99, 89, -1))
"""Scales tried, as parts of the block's (row's) largest magnitude; the kernels try the same."""

_CLEARLY_LESS = 1 - 2**-12
"""A candidate must win by more than the rounding of its own error sum, or it is not better."""


class Format(Protocol):
    """A way to store a matrix W (N, K); errors are bounded as docs/format.md says."""

    @property
    def name(self) -> str:
        """The name used in recipes and manifests."""

    def supports(self, rows: int, cols: int) -> bool:
        """Whether a (rows, cols) matrix can be stored this way."""

    def parts(self, rows: int, cols: int) -> PartShapes:
        """Name -> (dtype, shape) of what `pack` gives for a (rows, cols) matrix."""

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all parts."""

    def matrix(self, parts: Parts) -> kernels.Matrix:
        """Addresses of contiguous parts for the kernels; the parts must outlive it."""

    def pack(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """W (N, K) float32 -> parts; `search` tries scales around the largest magnitude."""

    def unpack(self, parts: Parts) -> torch.Tensor:
        """Parts -> W (N, K) float32."""

    def matmul(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x (T, K) float32 -> x @ W^T (T, N) float32."""


def _row_chunks(rows: int, cols: int, limit: int = _CHUNK) -> Iterator[slice]:
    step = max(1, limit // max(cols, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _f32(w: torch.Tensor) -> torch.Tensor:
    return w.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _native_matmul(
    native: kernels.Kernels, x: torch.Tensor, parts: Parts, fmt: Format
) -> torch.Tensor:
    """x (T, K) -> (T, N) by the kernels; the parts are contiguous."""
    x, w = _f32(x), fmt.matrix(parts)
    y = torch.empty((x.shape[0], w.rows), dtype=torch.float32)
    native.matmul(w, x.data_ptr(), x.shape[1], x.shape[0], y.data_ptr(), w.rows)
    return y


class _Quantized(ABC):
    """What NF4 and INT8 share: the choice between the kernel and the twin."""

    name: str
    code: int
    """`mimo_format` of the kernels."""

    def matrix(self, parts: Parts) -> kernels.Matrix:
        """Addresses of contiguous parts for the kernels; the parts must outlive it."""
        codes, scales = parts["codes"], parts["scales"]
        return kernels.Matrix(
            codes.data_ptr(), scales.data_ptr(), codes.shape[0], self._cols(parts), self.code
        )

    @abstractmethod
    def supports(self, rows: int, cols: int) -> bool: ...

    @abstractmethod
    def parts(self, rows: int, cols: int) -> PartShapes: ...

    @abstractmethod
    def pack_torch(self, w: torch.Tensor, *, search: bool = True) -> Parts: ...

    @abstractmethod
    def unpack_torch(self, parts: Parts) -> torch.Tensor: ...

    @abstractmethod
    def _cols(self, parts: Parts) -> int: ...

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all parts."""
        parts = self.parts(rows, cols).values()
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)

    def pack(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """W (N, K) float32 -> parts; raises PackError for a shape the format cannot hold."""
        w = _f32(w)
        rows, cols = w.shape
        if not self.supports(rows, cols):
            raise PackError(
                f"{self.name} cannot store a {rows} x {cols} matrix",
                hint=f"{self.name} needs columns in multiples of {BLOCK}; choose int8 for it",
            )
        native = kernels.get()
        if native is None:
            return self.pack_torch(w, search=search)
        out = {k: torch.empty(s, dtype=d) for k, (d, s) in self.parts(rows, cols).items()}
        codes, scales = out["codes"].data_ptr(), out["scales"].data_ptr()
        native.quantize(self.code, w.data_ptr(), rows, cols, codes, scales, search)
        return out

    def unpack(self, parts: Parts) -> torch.Tensor:
        """Parts -> W (N, K) float32."""
        native = kernels.get()
        if native is None:
            return self.unpack_torch(parts)
        parts = {name: part.contiguous() for name, part in parts.items()}
        w = self.matrix(parts)
        out = torch.empty((w.rows, w.cols), dtype=torch.float32)
        native.dequantize(w, out.data_ptr())
        return out

    def matmul(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x (T, K) float32 -> (T, N) float32; T <= 16: a row's bits do not depend on the others."""
        native = kernels.get()
        if native is None or x.shape[0] > NATIVE_ROWS:
            return self._matmul_by_rows(x, parts, self.unpack)
        return _native_matmul(native, x, {k: part.contiguous() for k, part in parts.items()}, self)

    def matmul_torch(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The twin of `matmul`."""
        return self._matmul_by_rows(x, parts, self.unpack_torch)

    def _matmul_by_rows(self, x: torch.Tensor, parts: Parts, unpack: Unpack) -> torch.Tensor:
        # The head of the real model would unpack to 2.5 GB: 64 MiB of weights at a time instead.
        x = _f32(x)
        n = parts["codes"].shape[0]
        y = torch.empty((x.shape[0], n), dtype=torch.float32)
        for rows in _row_chunks(n, self._cols(parts), 4 * _CHUNK):
            w = unpack({name: part[rows] for name, part in parts.items()})
            y[:, rows] = x @ w.T
        return y


class NF4(_Quantized):
    """4-bit normal-float: blocks of 64 along a row share a float16 scale; 4.25 bits a weight.

    `codes` uint8 (N, K/2), element 2i of a row in the HIGH nibble of byte i; `scales` float16
    (N, K/64). A code means NF4_CODES[code] * scale, which is bitsandbytes' own layout.
    """

    name = "nf4"
    code = kernels.NF4

    def supports(self, rows: int, cols: int) -> bool:
        """Columns must be a positive multiple of 64."""
        return rows > 0 and cols > 0 and cols % BLOCK == 0

    def parts(self, rows: int, cols: int) -> PartShapes:
        """codes uint8 (N, K/2), scales float16 (N, K/64)."""
        return {
            "codes": (torch.uint8, (rows, cols // 2)),
            "scales": (torch.float16, (rows, cols // BLOCK)),
        }

    def _cols(self, parts: Parts) -> int:
        return parts["codes"].shape[1] * 2

    def pack_torch(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """The twin of `pack`: nearest code to w / scale, ties to the lower code."""
        w = _f32(w)
        n, k = w.shape
        codes = torch.empty((n, k // 2), dtype=torch.uint8)
        scales = torch.empty((n, k // BLOCK), dtype=torch.float16)
        for rows in _row_chunks(n, k):
            blocks = w[rows].reshape(-1, BLOCK)
            factors = _NF4_FACTORS if search else ()
            scale, best = _best(blocks, factors, _half_scale, _nf4_nearest, _nf4_values)
            pairs = best.view(-1, 2)
            codes[rows] = ((pairs[:, 0] << 4) | pairs[:, 1]).view(-1, k // 2)
            scales[rows] = scale.view(-1, k // BLOCK)
        return {"codes": codes, "scales": scales}

    def unpack_torch(self, parts: Parts) -> torch.Tensor:
        """The twin of `unpack`."""
        codes, scales = parts["codes"], parts["scales"]
        n, k = codes.shape[0], codes.shape[1] * 2
        out = torch.empty((n, k), dtype=torch.float32)
        for rows in _row_chunks(n, k):
            packed = codes[rows].int()
            both = torch.stack((packed >> 4, packed & 15), dim=-1)
            blocks = _nf4_values(both).view(-1, k // BLOCK, BLOCK)
            out[rows] = (blocks * scales[rows].float().unsqueeze(-1)).view(-1, k)
        return out


def _half_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """Float16 scale of a block's magnitude: saturates at 65504, and only zero gives zero."""
    scale = magnitude.clamp(max=65504.0).half()
    return torch.where((scale == 0) & (magnitude > 0), torch.tensor(2.0**-24).half(), scale)


def _nf4_nearest(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes uint8 (B, 64) for blocks (B, 64) and scales (B,); a block of zeros gets code 7."""
    x = blocks * _inverse(scale)
    # Counting the middles below x is 2.6 times faster than torch.bucketize; ties go down.
    code = torch.zeros(x.shape, dtype=torch.uint8)
    table = torch.tensor(NF4_CODES)
    for middle in ((table[1:] + table[:-1]) / 2).tolist():
        code += x > middle
    return code


def _nf4_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(NF4_CODES)[codes.int()]


def _int8_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """Float32 scale of a row's magnitude; never denormal, so that its inverse is finite."""
    scale = (magnitude / 127).clamp(min=2.0**-126)
    return torch.where(magnitude == 0, 0.0, scale)


def _int8_nearest(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (w * _inverse(scale)).clamp_(-127, 127).round_().to(torch.int8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale as a column, 0 for a scale of 0. The kernels multiply by the same inverse."""
    wide = scale.float()
    return torch.where(wide == 0, 0.0, 1.0 / wide).unsqueeze(1)


_Map = Callable[[torch.Tensor], torch.Tensor]


def _best(
    w: torch.Tensor,
    factors: Sequence[float],
    to_scale: _Map,
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: _Map,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale per row of w (B, L), and codes (B, L): least squared error of 1 and `factors`."""
    magnitude = w.abs().amax(dim=1)
    if not bool(magnitude.isfinite().all()):
        raise PackError("weights hold NaN or infinity", hint="the source tensor is damaged")

    def error(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return (values(codes) * scale.float().unsqueeze(1) - w).square_().sum(dim=1)

    scale = to_scale(magnitude)
    codes = nearest(w, scale)
    least = error(scale, codes) if factors else magnitude
    for factor in factors:
        candidate = to_scale(magnitude * factor)
        tried = nearest(w, candidate)
        e = error(candidate, tried)
        better = e < least * _CLEARLY_LESS
        least = torch.where(better, e, least)
        scale = torch.where(better, candidate, scale)
        codes = torch.where(better.unsqueeze(1), tried, codes)
    return scale, codes


class INT8(_Quantized):
    """One float32 scale per row, codes -127..127: 8 bits a weight plus 32 a row.

    `codes` int8 (N, K), `scales` float32 (N,); a code means code * scale.
    """

    name = "int8"
    code = kernels.INT8

    def supports(self, rows: int, cols: int) -> bool:
        """Any matrix."""
        return rows > 0 and cols > 0

    def parts(self, rows: int, cols: int) -> PartShapes:
        """codes int8 (N, K), scales float32 (N,)."""
        return {"codes": (torch.int8, (rows, cols)), "scales": (torch.float32, (rows,))}

    def _cols(self, parts: Parts) -> int:
        return parts["codes"].shape[1]

    def pack_torch(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """The twin of `pack`: round half to even of w / scale, clamped to +-127."""
        w = _f32(w)
        n, k = w.shape
        codes = torch.empty((n, k), dtype=torch.int8)
        scales = torch.empty(n, dtype=torch.float32)
        for rows in _row_chunks(n, k):
            factors = _INT8_FACTORS if search else ()
            scales[rows], codes[rows] = _best(
                w[rows], factors, _int8_scale, _int8_nearest, torch.Tensor.float
            )
        return {"codes": codes, "scales": scales}

    def unpack_torch(self, parts: Parts) -> torch.Tensor:
        """The twin of `unpack`."""
        return parts["codes"].float() * parts["scales"].unsqueeze(1)


class Plain:
    """The weights as they are, in one dtype: part `weight` (N, K)."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self.code = kernels.BF16 if dtype == torch.bfloat16 else kernels.F32

    def matrix(self, parts: Parts) -> kernels.Matrix:
        """Address of a contiguous weight for the kernels; it must outlive it."""
        w = parts["weight"]
        return kernels.Matrix(w.data_ptr(), None, w.shape[0], w.shape[1], self.code)

    def supports(self, rows: int, cols: int) -> bool:
        """Any matrix."""
        return rows > 0 and cols > 0

    def parts(self, rows: int, cols: int) -> PartShapes:
        """weight (N, K)."""
        return {"weight": (self.dtype, (rows, cols))}

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of the weights."""
        return rows * cols * self.dtype.itemsize

    def pack(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """W (N, K) float32 -> its copy, rounded to the dtype; there is no scale to search."""
        copied = torch.empty(w.shape, dtype=self.dtype)
        return {"weight": copied.copy_(w.detach())}

    def unpack(self, parts: Parts) -> torch.Tensor:
        """Parts -> W (N, K) float32."""
        return parts["weight"].float()

    def matmul(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x (T, K) float32 -> (T, N) float32, float32 sums; BF16 natively for T <= 16."""
        native = kernels.get()
        if native is None or self.dtype != torch.bfloat16 or x.shape[0] > NATIVE_ROWS:
            return self.matmul_torch(x, parts)
        return _native_matmul(native, x, {"weight": parts["weight"].contiguous()}, self)

    def matmul_torch(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The twin of `matmul`."""
        x, w = _f32(x), parts["weight"]
        if w.dtype == torch.float32:
            return x @ w.T
        y = torch.empty((x.shape[0], w.shape[0]), dtype=torch.float32)
        for rows in _row_chunks(w.shape[0], w.shape[1], 4 * _CHUNK):
            y[:, rows] = x @ w[rows].float().T
        return y


FORMATS: dict[str, Format] = {
    "nf4": NF4(),
    "int8": INT8(),
    "bf16": Plain("bf16", torch.bfloat16),
    "f32": Plain("f32", torch.float32),
}


def get_format(name: str) -> Format:
    """The format called `name`; raises PackError for a name this version does not know."""
    if name not in FORMATS:
        raise PackError(
            f"unknown weight format {name!r}",
            hint=f"this version knows {', '.join(FORMATS)}; a newer one may have written the pack",
        )
    return FORMATS[name]
