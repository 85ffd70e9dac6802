"""The source of `triton_experts`' two kernels; importing it imports Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decoded(at, scales, table):
    """Bytes of 2 codes, (BN, NB, 32) addresses; scales (BN, NB) -> weights of the even places and
    of the odd ones, float32: the even one is in the high half of a byte."""
    codes = tl.load(at).to(tl.int32)
    scale = tl.load(scales)[:, :, None]
    return tl.load(table + (codes >> 4)) * scale, tl.load(table + (codes & 15)) * scale


@triton.jit(do_not_specialize=["half"])
def gate_up(
    x, pairs, slots, table, hidden, slot_bytes, gate_codes, gate_scales, up_codes, up_scales, half,
    K: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    BN: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """hidden (T * K, NARROW) = silu(gate x) * up x of the pair's expert; x (2, T, WIDE / 2), `half`
    of its numbers before its odd places.

    Both have the even places first, then the odd ones. A program makes BN rows of one pair; pairs
    (T * K,) int32: the slot of a pair's expert, -1 where it is not here.
    """
    pair = tl.program_id(1)
    slot = tl.load(pairs + pair)
    if slot >= 0:
        row = tl.program_id(0) * BN + tl.arange(0, BN)
        group = tl.arange(0, NB)
        byte = tl.arange(0, 32)
        base = slots + slot.to(tl.int64) * slot_bytes
        place = row[:, None, None] * (WIDE // 2) + group[None, :, None] * 32 + byte[None, None, :]
        places = row[:, None] * (WIDE // 64) + group[None, :]
        even = x + (pair // K) * (WIDE // 2) + group[:, None] * 32 + byte[None, :]
        odd = even + half
        gate_at, up_at = base + gate_codes + place, base + up_codes + place
        gate_by = (base + gate_scales).to(tl.pointer_type(tl.float32)) + places
        up_by = (base + up_scales).to(tl.pointer_type(tl.float32)) + places
        gate = tl.zeros((BN, NB, 32), dtype=tl.float32)
        up = tl.zeros((BN, NB, 32), dtype=tl.float32)
        for block in range(0, WIDE // 64, NB):
            first = tl.load(even + block * 32).to(tl.float32)[None, :, :]
            second = tl.load(odd + block * 32).to(tl.float32)[None, :, :]
            a, b = _decoded(gate_at + block * 32, gate_by + block, table)
            gate += a * first + b * second
            a, b = _decoded(up_at + block * 32, up_by + block, table)
            up += a * first + b * second
        g = tl.sum(tl.sum(gate, 2), 1)
        u = tl.sum(tl.sum(up, 2), 1)
        out = g / (1.0 + tl.exp(-g)) * u
        at = hidden + pair * NARROW + (row % 2) * (NARROW // 2) + row // 2
        tl.store(at, out.to(hidden.dtype.element_ty))


@triton.jit
def down(
    hidden, pairs, shares, slots, table, y, slot_bytes, down_codes, down_scales,
    K: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    BN: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """y (T, WIDE) f32 = the sum over a row's pairs of share * (down hidden), in their order."""
    t = tl.program_id(1)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    group = tl.arange(0, NB)
    byte = tl.arange(0, 32)
    place = row[:, None, None] * (NARROW // 2) + group[None, :, None] * 32 + byte[None, None, :]
    places = row[:, None] * (NARROW // 64) + group[None, :]
    within = group[:, None] * 32 + byte[None, :]
    total = tl.zeros((BN, NB, 32), dtype=tl.float32)
    for k in range(K):
        pair = t * K + k
        slot = tl.load(pairs + pair)
        if slot >= 0:
            share = tl.load(shares + pair)
            base = slots + slot.to(tl.int64) * slot_bytes
            at = base + down_codes + place
            by = (base + down_scales).to(tl.pointer_type(tl.float32)) + places
            even = hidden + pair * NARROW + within
            odd = even + NARROW // 2
            for block in range(0, NARROW // 64, NB):
                first = tl.load(even + block * 32).to(tl.float32)[None, :, :] * share
                second = tl.load(odd + block * 32).to(tl.float32)[None, :, :] * share
                a, b = _decoded(at + block * 32, by + block, table)
                total += a * first + b * second
    out = tl.sum(tl.sum(total, 2), 1)
    tl.store(y + t * WIDE + row, out)
