"""The torch twins of the kernels' quantisers: what NF4, MXFP4 and INT8 do to a matrix, in tensors.

Arithmetic of a few million weights at a time (`formats` cuts them up); knows no parts, no bytes of
codes and no files. Without scale search a twin gives the kernels' bits, with it their algorithm:
only the order of float32 sums differs. Called by `quant.formats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from mimo_local.errors import PackError

# fmt: off
NF4_CODES: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 values of bitsandbytes' nf4 code, exact in float32."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values of MXFP4's codes."""

HALF_MAX = 65504.0
CLAMPED = 65520.0
"""Magnitudes from here on round to infinity in float16: their block's scale saturates."""
_WORD = 32767
_MIDDLES = [(a + b) / 2 for a, b in pairwise(NF4_CODES)]

_FACTORS = (1, 0.76, 0.785, 0.81, 0.83, 0.85, 0.87, 0.89, 0.91, 0.93, 0.95, 0.975, 1.025, 1.05)
NF4_TRIALS: list[float] = torch.tensor([*_FACTORS, 1.075, 1.1]).tolist()
"""Scales tried, as parts of the plain scale."""
_INT8_FACTORS = tuple(n / 100 for n in range(99, 89, -1))
_CLEARLY_LESS = 1 - 2**-12
"""A candidate must win by more than the rounding of its own error sum, or it is not better."""


def _largest(w: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of w (B, L); raises PackError for NaN and infinity."""
    magnitude = w.abs().amax(dim=1)
    if not bool(magnitude.isfinite().all()):
        raise PackError("weights hold NaN or infinity", hint="the source tensor is damaged")
    return magnitude


# ---- NF4 ----------------------------------------------------------------------------------------


def half_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """Float16 scale of a block's magnitude: saturates at 65504, and only zero gives zero."""
    scale = magnitude.clamp(max=HALF_MAX).half()
    return torch.where((scale == 0) & (magnitude > 0), torch.tensor(2.0**-24).half(), scale)


def nf4_values(codes: torch.Tensor) -> torch.Tensor:
    """Codes, any shape -> their values for a scale of 1, float32."""
    return torch.tensor(NF4_CODES)[codes.int()]


def nf4_quantize(blocks: torch.Tensor, *, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (B, 64) float32 -> scales (B,) float16, codes (B, 64) uint8."""
    magnitude = _largest(blocks)
    inside = magnitude < CLAMPED
    blocks = torch.where(inside.unsqueeze(1), blocks, blocks.clamp(-HALF_MAX, HALF_MAX))
    plain = half_scale(magnitude)
    words = _nf4_words(blocks, plain.float())
    codes = _nf4_nearest(words)
    if not search:
        return plain, codes
    before = _Fit(blocks, codes)
    tried = plain.float() * torch.tensor(NF4_TRIALS)[nf4_trial_errors(words).argmin(dim=0)]
    after = _Fit(blocks, _nf4_nearest(_nf4_words(blocks, tried)))
    fitted = half_scale(torch.where(after.both > 0, after.both / after.values, plain.float()))
    # By more than what these sums are rounded by, and words are.
    limit = before.error(plain) - before.weights * 2**-15
    better = (after.error(fitted) < limit) & (after.both > 0) & inside
    scale = torch.where(better, fitted, plain)
    return scale, _nf4_nearest(_nf4_words(blocks, scale.float()))


def nf4_codes(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks (B, L) and their float32 scales (B,), of either sign -> codes uint8 (B, L)."""
    return _nf4_nearest(_nf4_words(blocks, scale))


def _nf4_words(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights as int32 multiples of scale / 32767, ties to even, kept within 16 bits."""
    factor = torch.where(scale == 0, 0.0, _WORD / scale).unsqueeze(1)
    return (blocks * factor).clamp_(-32768, 32767).round_().int()


def _nf4_nearest(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8; a block of zeros gets code 7."""
    # Counting the middles below x is 2.6 times faster than torch.bucketize; ties go down.
    code = torch.zeros(words.shape, dtype=torch.uint8)
    for middle in _MIDDLES:
        code += words > math.floor(middle * _WORD)
    return code


def nf4_trial_errors(words: torch.Tensor) -> torch.Tensor:
    """Squared errors (16, B) of NF4_TRIALS for words (B, 64), in bytes as the kernels do it."""
    cell, off = words >> 11 & 31, words >> 6 & 31
    sums = []
    for factor in NF4_TRIALS:
        threshold, half = _cells(512 * factor)
        error = (off - threshold[cell]).abs() - half[cell]
        sums.append((error * error).sum(dim=1))
    return torch.stack(sums)


def _cells(unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell of 32 / 512 of the magnitude: what an offset in it is compared with (quantize.inc).

    Where a middle of two codes lies in the cell: that, and half the distance of the two. Elsewhere
    the one value that is nearest, and 0. A word's 64ths are rounded down: half a one is missing.
    """
    thresholds, halves = [0] * 32, [0] * 32
    for cell in range(-16, 16):
        begin = 32 * cell + 0.5
        code = next((c for c, middle in enumerate(_MIDDLES) if middle * unit >= begin), 15)
        at, half = NF4_CODES[code] * unit, 0.0
        if code < 15 and _MIDDLES[code] * unit < begin + 32:
            at = _MIDDLES[code] * unit
            half = 0.5 * (NF4_CODES[code + 1] - NF4_CODES[code]) * unit
        thresholds[cell & 31] = math.floor(at - begin + 0.5)
        halves[cell & 31] = math.floor(half + 0.5)
    return torch.tensor(thresholds), torch.tensor(halves)


class _Fit:
    """What the squared error of any scale is made of once the codes are chosen."""

    def __init__(self, blocks: torch.Tensor, codes: torch.Tensor) -> None:
        values = nf4_values(codes)
        self.weights = blocks.square().sum(dim=1)
        self.both = (blocks * values).sum(dim=1)
        self.values = values.square_().sum(dim=1)

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        s = scale.float()
        return self.weights - 2 * s * self.both + s * s * self.values


# ---- MXFP4 --------------------------------------------------------------------------------------

_E2M1_UNIT = 2048
# The last multiple of 1/2048 that still gets the code below: ties go to the even code.
_E2M1_LIMITS = (512, 1535, 2560, 3583, 5120, 7167, 10240)
_LEAST = 11  # 2^-116, so that the kernels' factor stays finite
MXFP4_MOST = 252
"""2^125; 6 times the next one is infinite in float32."""


def mxfp4_values(codes: torch.Tensor) -> torch.Tensor:
    """Codes, any shape -> their values for a scale of 1, float32."""
    return torch.tensor(E2M1)[codes.int()]


def mxfp4_scale(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes -> float32: 2^(byte - 127), NaN for 255."""
    bits = torch.where(scales == 0, 0x00400000, scales.int() << 23)
    return torch.where(scales == 255, 0x7FC00000, bits).view(torch.float32)


def mxfp4_quantize(blocks: torch.Tensor, *, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (B, 32) float32 -> scales (B,) uint8, codes (B, 32) uint8."""
    bits = _largest(blocks).view(torch.int32)
    lower = (bits >> 23) - 2
    plain = ((bits + 0x00200000 >> 23) - 2).clamp(_LEAST, MXFP4_MOST)
    if search:
        up = plain == lower
        inside = (lower >= _LEAST) & (lower < MXFP4_MOST)
        other = torch.where(inside, torch.where(up, lower + 1, lower), plain)
        before, after = (_mxfp4_error(blocks, scale) for scale in (plain, other))
        after, before = torch.where(up, 4 * after, after), torch.where(up, before, 4 * before)
        plain = torch.where(after + (after >> 8) < before, other, plain)
    scale = torch.where(bits == 0, 0, plain)
    words = _mxfp4_words(blocks, scale)
    return scale.to(torch.uint8), _mxfp4_nearest(words) | (words < 0).to(torch.uint8) << 3


def _mxfp4_words(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights as int32 multiples of scale / 2048, ties to even."""
    factor = torch.where(scale == 0, 0, 265 - scale << 23).int().view(torch.float32)
    return (blocks * factor.unsqueeze(1)).round_().int()


def _mxfp4_nearest(words: torch.Tensor) -> torch.Tensor:
    """Codes 0..7 of the words' magnitudes, uint8."""
    magnitude = words.abs()
    code = torch.zeros(words.shape, dtype=torch.uint8)
    for limit in _E2M1_LIMITS:
        code += magnitude > limit
    return code


def _mxfp4_error(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared errors (B,) int64, in units of the blocks' own scales."""
    words = _mxfp4_words(blocks, scale)
    levels = (mxfp4_values(_mxfp4_nearest(words)) * _E2M1_UNIT).int()
    return (words.abs() - levels).square_().sum(dim=1)


# ---- INT8 ---------------------------------------------------------------------------------------


def int8_quantize(rows: torch.Tensor, *, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, K) float32 -> scales (N,) float32, codes (N, K) int8."""
    magnitude = _largest(rows)
    factors: Sequence[float] = _INT8_FACTORS if search else ()
    scale = _int8_scale(magnitude)
    codes = _int8_nearest(rows, scale)
    least = _int8_error(rows, scale, codes) if factors else magnitude
    for factor in factors:
        candidate = _int8_scale(magnitude * factor)
        tried = _int8_nearest(rows, candidate)
        e = _int8_error(rows, candidate, tried)
        better = e < least * _CLEARLY_LESS
        least = torch.where(better, e, least)
        scale = torch.where(better, candidate, scale)
        codes = torch.where(better.unsqueeze(1), tried, codes)
    return scale, codes


def _int8_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """Float32 scale of a row's magnitude; never denormal, so that its inverse is finite."""
    scale = (magnitude / 127).clamp(min=2.0**-126)
    return torch.where(magnitude == 0, 0.0, scale)


def _int8_nearest(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale).unsqueeze(1)  # the kernels' rounding
    return (w * inverse).clamp_(-127, 127).round_().to(torch.int8)


def _int8_error(w: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (codes.float() * scale.unsqueeze(1) - w).square_().sum(dim=1)
