"""The source of `triton_w8`'s kernel; importing it imports Triton. Called by `triton_w8`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


# m is left general: Triton would compile 1 and 16 again for themselves.
@triton.jit(do_not_specialize=["m"])
def w8a16(
    x, codes, scales, y, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y (m, n) = x (m, k) * (codes (n, k) * scales (n,))^T; a program makes BN columns of y.

    EVEN: BK divides k. Codes become bfloat16, which holds them exactly, on the way from shared
    memory to the tensor cores; sums are float32 and the scale comes last.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    batch = tl.arange(0, BM)
    col = tl.arange(0, BK)
    live = (rows < n)[None, :]
    there = (batch < m)[:, None]
    # A row's place: the head's codes end beyond 2^29, 64 bits leave room for any matrix.
    w_at = codes + rows[None, :].to(tl.int64) * k + col[:, None]
    x_at = x + batch[:, None] * k + col[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, k, BK):
        if EVEN:
            w = tl.load(w_at, mask=live, other=0)
            a = tl.load(x_at, mask=there, other=0.0)
        else:
            inside = start + col < k
            w = tl.load(w_at, mask=live & inside[:, None], other=0)
            a = tl.load(x_at, mask=there & inside[None, :], other=0.0)
        total = tl.dot(a, w.to(a.dtype), total)
        w_at += BK
        x_at += BK
    scale = tl.load(scales + rows, mask=rows < n, other=0.0)
    out = total * scale[None, :]
    tl.store(y + batch[:, None] * n + rows[None, :], out.to(y.dtype.element_ty), mask=there & live)
