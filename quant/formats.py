"""How a weight matrix is stored: NF4, MXFP4, INT8, BF16, F32; each can pack, unpack and multiply.

The one place that chooses between the native kernel and its torch twin (`twins`). Knows bytes and
rows, not what a matrix is for. Called by `convert` and `pack` (making packs) and
`mimo_local.weights` (running them). The bytes are described in docs/format.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from mimo_local import kernels
from mimo_local.errors import PackError
from quant import twins
from quant.fp8 import Fp8Rows
from quant.twins import NF4_CODES

__all__ = ["FORMATS", "INT8", "MXFP4", "NF4", "NF4_CODES", "Format", "Parts", "Plain", "get_format"]

Parts = dict[str, torch.Tensor]
"""A stored matrix: what `Format.parts` names, as CPU tensors."""
Unpack = Callable[[Parts], torch.Tensor]
PartShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Part name -> (dtype, shape)."""

BLOCK = 64
"""NF4: weights that share one scale; rows of 4-bit formats are whole multiples of it."""
MX_BLOCK = 32
"""MXFP4: weights that share one scale."""

NATIVE_ROWS = 16
"""Up to this many rows the kernels multiply packed weights; above, unpacking once is cheaper."""

_CHUNK = 1 << 22
"""Weights a torch twin works on at once: 16 MiB in float32, so temporaries stay below ~200 MB."""


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

    def pack(
        self, w: torch.Tensor | Fp8Rows, *, search: bool = True, out: Parts | None = None
    ) -> Parts:
        """W (N, K) float32, or FP8 -> parts, new ones or those of `out`.

        `search` tries scales around the largest magnitude.
        """

    def unpack(self, parts: Parts) -> torch.Tensor:
        """Parts -> W (N, K) float32."""

    def matmul(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x (T, K) float32 -> x @ W^T (T, N) float32."""


def _row_chunks(rows: int, cols: int, limit: int = _CHUNK) -> Iterator[slice]:
    step = max(1, limit // max(cols, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _f32(w: torch.Tensor | Fp8Rows) -> torch.Tensor:
    if isinstance(w, Fp8Rows):
        return w.values()
    return w.detach().to(device="cpu", dtype=torch.float32).contiguous()


def source_of(w: torch.Tensor | Fp8Rows) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Contiguous weights for the kernels and, for FP8, where its scales are."""
    if not isinstance(w, Fp8Rows) or w.codes.dtype != torch.float8_e4m3fn:
        return _f32(w), ()
    return w.codes, (w.grid.data_ptr(), w.grid.shape[0], w.row_of.data_ptr(), w.block)


def _native_matmul(
    native: kernels.Kernels, x: torch.Tensor, parts: Parts, fmt: Format
) -> torch.Tensor:
    """x (T, K) -> (T, N) by the kernels; the parts are contiguous."""
    x, w = _f32(x), fmt.matrix(parts)
    y = torch.empty((x.shape[0], w.rows), dtype=torch.float32)
    native.matmul(w, x.data_ptr(), x.shape[1], x.shape[0], y.data_ptr(), w.rows)
    return y


class _Quantized(ABC):
    """What NF4, MXFP4 and INT8 share: the choice between the kernel and the twin."""

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

    def pack(
        self, w: torch.Tensor | Fp8Rows, *, search: bool = True, out: Parts | None = None
    ) -> Parts:
        """As `Format.pack`; PackError for a shape the format cannot hold, NativeError for NaN."""
        rows, cols = w.shape
        if not self.supports(rows, cols):
            raise PackError(
                f"{self.name} cannot store a {rows} x {cols} matrix",
                hint=f"{self.name} needs columns in multiples of {BLOCK}; choose int8 for it",
            )
        native = kernels.get()
        if native is None:
            packed = self.pack_torch(_f32(w), search=search)
            return packed if out is None else {k: out[k].copy_(v) for k, v in packed.items()}
        if out is None:
            out = {k: torch.empty(s, dtype=d) for k, (d, s) in self.parts(rows, cols).items()}
        raw, fp8 = source_of(w)
        codes, scales = out["codes"].data_ptr(), out["scales"].data_ptr()
        native.quantize(self.code, raw.data_ptr(), rows, cols, codes, scales, search, *fp8)
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


class _FourBit(_Quantized):
    """What NF4 and MXFP4 share: two codes in a byte, element 2i of a row in the HIGH nibble."""

    block: int
    scale_dtype: torch.dtype

    def supports(self, rows: int, cols: int) -> bool:
        """Columns must be a positive multiple of 64."""
        return rows > 0 and cols > 0 and cols % BLOCK == 0

    def parts(self, rows: int, cols: int) -> PartShapes:
        """codes uint8 (N, K/2), scales (N, K/block)."""
        return {
            "codes": (torch.uint8, (rows, cols // 2)),
            "scales": (self.scale_dtype, (rows, cols // self.block)),
        }

    def _cols(self, parts: Parts) -> int:
        return parts["codes"].shape[1] * 2

    @abstractmethod
    def _quantize(
        self, blocks: torch.Tensor, *, search: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def _values(self, codes: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _scale(self, scales: torch.Tensor) -> torch.Tensor: ...

    def pack_torch(self, w: torch.Tensor, *, search: bool = True) -> Parts:
        """The twin of `pack`."""
        w = _f32(w)
        n, k = w.shape
        out = {part: torch.empty(s, dtype=d) for part, (d, s) in self.parts(n, k).items()}
        for rows in _row_chunks(n, k):
            scale, codes = self._quantize(w[rows].reshape(-1, self.block), search=search)
            pairs = codes.view(-1, 2)
            out["codes"][rows] = ((pairs[:, 0] << 4) | pairs[:, 1]).view(-1, k // 2)
            out["scales"][rows] = scale.view(-1, k // self.block)
        return out

    def unpack_torch(self, parts: Parts) -> torch.Tensor:
        """The twin of `unpack`."""
        codes, scales = parts["codes"], parts["scales"]
        n, k = codes.shape[0], codes.shape[1] * 2
        out = torch.empty((n, k), dtype=torch.float32)
        for rows in _row_chunks(n, k):
            packed = codes[rows]
            both = torch.stack((packed >> 4, packed & 15), dim=-1)
            blocks = self._values(both).view(-1, k // self.block, self.block)
            out[rows] = (blocks * self._scale(scales[rows]).unsqueeze(-1)).view(-1, k)
        return out


class NF4(_FourBit):
    """4-bit normal-float: blocks of 64 along a row share a float16 scale; 4.25 bits a weight.

    `codes` uint8 (N, K/2), element 2i of a row in the HIGH nibble of byte i; `scales` float16
    (N, K/64). A code means NF4_CODES[code] * scale, which is bitsandbytes' own layout.
    """

    name = "nf4"
    code = kernels.NF4
    block = BLOCK
    scale_dtype = torch.float16

    def _quantize(self, blocks: torch.Tensor, *, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return twins.nf4_quantize(blocks, search=search)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return twins.nf4_values(codes)

    def _scale(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.float()


class MXFP4(_FourBit):
    """OCP microscaling FP4: blocks of 32 along a row share a power of two; 4.25 bits a weight.

    `codes` uint8 (N, K/2), element 2i of a row in the HIGH nibble of byte i; `scales` uint8
    (N, K/32), E8M0. A code means E2M1[code] * 2^(scale - 127). Hub checkpoints hold the same
    numbers with the nibbles the other way round (`quant.mxfp4`).
    """

    name = "mxfp4"
    code = kernels.MXFP4
    block = MX_BLOCK
    scale_dtype = torch.uint8

    def _quantize(self, blocks: torch.Tensor, *, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return twins.mxfp4_quantize(blocks, search=search)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return twins.mxfp4_values(codes)

    def _scale(self, scales: torch.Tensor) -> torch.Tensor:
        return twins.mxfp4_scale(scales)


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
        codes = torch.empty(w.shape, dtype=torch.int8)
        scales = torch.empty(w.shape[0], dtype=torch.float32)
        for rows in _row_chunks(*w.shape):
            scales[rows], codes[rows] = twins.int8_quantize(w[rows], search=search)
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

    def pack(
        self, w: torch.Tensor | Fp8Rows, *, search: bool = True, out: Parts | None = None
    ) -> Parts:
        """W (N, K) -> its copy, rounded to the dtype; there is no scale to search."""
        copy = torch.empty(w.shape, dtype=self.dtype) if out is None else out["weight"]
        return {"weight": copy.copy_(_f32(w) if isinstance(w, Fp8Rows) else w.detach())}

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
    "mxfp4": MXFP4(),
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
