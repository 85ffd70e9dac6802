"""Weight formats: bitsandbytes reads our NF4, MXFP4 is the OCP's, errors bounded, kernel = twin."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels
from mimo_local.errors import PackError
from quant.formats import FORMATS, INT8, MXFP4, NF4, NF4_CODES, Parts, get_format
from quant.fp8 import Fp8Rows
from quant.measure import relative_rms

torch.set_num_threads(1)
TWINS = (NF4(), MXFP4(), INT8())
SHAPES = [(1, 64), (3, 128), (17, 192), (64, 448)]


FEW_ROWS = 1.5e-2
"""The kernels round activations to int8, 64 a step (and NF4's values to int8): 7e-3 of the rms."""


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative rms of the difference."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    """bitsandbytes.functional; its CPU backend logs a note about an optional download."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    yield bitsandbytes.functional


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    chi = torch.randn(4, rows, cols, generator=g).square().mean(0).sqrt()
    return torch.randn(rows, cols, generator=g) / chi  # Student's t, 4 degrees of freedom


def realistic(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Trained-looking: rows and columns of different size, a few outlier columns, some zeros."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * 0.02
    w *= torch.exp(0.3 * torch.randn(rows, 1, generator=g))
    w *= torch.exp(0.2 * torch.randn(1, cols, generator=g))
    w[:, torch.randperm(cols, generator=g)[: cols // 100]] *= 8
    return w * (torch.rand(rows, cols, generator=g) > 0.001)


def odd_values(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Rows of every magnitude that float16 holds, blocks of zeros, ties of both 4-bit codes."""
    w = gaussian(rows, cols, seed) * 2.0 ** (torch.arange(rows) % 38 - 24).unsqueeze(1)
    ties = torch.tensor([0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5.0])
    w[:, 5::7] = ties[torch.arange(w[0, 5::7].numel()) % 7]
    w[rows // 2, :64] = 0
    return w


@pytest.mark.parametrize("make", [gaussian, heavy_tailed, realistic])
@pytest.mark.parametrize("search", [False, True])
def test_nf4_loses_no_more_than_bitsandbytes(bnb: Any, make: Any, search: bool) -> None:
    w = make(256, 512)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    limit = relative_rms(w, bnb.dequantize_4bit(theirs, state))
    for pack in (FORMATS["nf4"].pack, NF4().pack_torch):
        ours = relative_rms(w, FORMATS["nf4"].unpack(pack(w, search=search)))
        # Without the search only the float16 rounding of the scale differs (2^-12 of the value).
        assert ours <= (limit * 0.98 if search else limit * 1.001)


def test_bitsandbytes_reads_our_bytes_as_the_same_numbers(bnb: Any) -> None:
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_CODES))
    w = realistic(48, 320)
    parts = FORMATS["nf4"].pack(w)
    state = bnb.QuantState(
        absmax=parts["scales"].float().view(-1),
        shape=w.shape,
        code=torch.tensor(NF4_CODES),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    theirs = bnb.dequantize_4bit(parts["codes"].view(-1, 1), state)
    assert torch.equal(theirs, FORMATS["nf4"].unpack(parts))
    assert torch.equal(theirs, NF4().unpack_torch(parts))


@pytest.mark.parametrize("fmt", TWINS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_twin_give_the_same_bytes(
    fmt: NF4 | MXFP4 | INT8, shape: tuple[int, int]
) -> None:
    if kernels.get() is None:
        pytest.skip("no native library here: the twin is all there is")
    for w in (gaussian(*shape), heavy_tailed(*shape), realistic(*shape), odd_values(*shape)):
        native, twin = fmt.pack(w, search=False), fmt.pack_torch(w, search=False)
        for part in native:
            assert torch.equal(native[part], twin[part]), part
        assert torch.equal(fmt.unpack(native), fmt.unpack_torch(native))
        x = gaussian(5, shape[1], seed=1)
        scale = x.norm() * w.norm() / shape[1] ** 0.5  # a product alone may be next to nothing
        assert (fmt.matmul(x, native) - fmt.matmul_torch(x, native)).norm() <= FEW_ROWS * scale
        native, twin = fmt.pack(w), fmt.pack_torch(w)
        # NF4's and INT8's searches compare float32 sums, which are added up in another order.
        differ = (native["scales"] != twin["scales"]).float().mean()
        assert differ <= (0 if fmt.name == "mxfp4" else 0.01)
        found = relative_rms(w, fmt.unpack(native))
        assert found == pytest.approx(relative_rms(w, fmt.unpack(twin)), rel=2e-3)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", FORMATS)
def test_fp8_is_packed_as_its_values(
    name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(kernels, "get", lambda: None)
    elif kernels.get() is None:
        pytest.skip("no native library here")
    rows, cols, block = 70, 320, 128
    row_of = (torch.arange(rows) // 32).flip(0).int()
    grid = gaussian(3, 3).abs() * 1e-3
    stored = Fp8Rows(gaussian(rows, cols, 1).mul(60).to(dtype), grid, row_of, block)
    wide = grid[row_of.long()].repeat_interleave(block, 1)[:, :cols] * stored.codes.float()
    assert torch.equal(stored.values(), wide)
    fmt = get_format(name)
    wanted = fmt.pack(wide)
    out = {part: torch.empty(s, dtype=d) for part, (d, s) in fmt.parts(rows, cols).items()}
    for found in (fmt.pack(stored), fmt.pack(stored, out=out), fmt.pack(wide, out=out)):
        for part in wanted:
            assert torch.equal(found[part], wanted[part]), part
    assert found[part] is out[part]


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    exponent=st.integers(-30, 12),  # gaussians stay within 6 of 0: below float16's 65504
    zero_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_was_packed_comes_back(
    name: str, rows: int, blocks: int, exponent: int, zero_rows: bool, seed: int
) -> None:
    fmt = get_format(name)
    cols = 64 * blocks
    w = gaussian(rows, cols, seed) * 2.0**exponent
    if zero_rows:
        w[0] = 0
    parts = fmt.pack(w)
    stated = fmt.parts(rows, cols)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in parts.items()} == stated
    assert sum(p.nbytes for p in parts.values()) == fmt.nbytes(rows, cols)
    back = fmt.unpack(parts)
    assert back.shape == w.shape and back.dtype == torch.float32
    if zero_rows:
        assert not back[0].any()
    block = {"nf4": 64, "mxfp4": 32}.get(name, cols)
    blockwise = w.view(rows, -1, block)
    largest = blockwise.abs().amax(-1, keepdim=True)
    # Half the widest gap of the code, as part of the largest magnitude. The search may clip it by
    # up to a quarter (nf4, and what is near 8 becomes 6 in mxfp4) or a tenth (int8); a scale below
    # float16's normal range adds 2^-24.
    part = {"nf4": 0.25, "mxfp4": 0.25, "int8": 0.1, "bf16": 2**-8, "f32": 0.0}[name]
    bound = part * largest + 2.0**-24
    error = (back.view(blockwise.shape) - blockwise).abs()
    assert (error <= bound * (name != "f32")).all()
    again = fmt.unpack(fmt.pack(w, search=False))
    assert relative_rms(w, back) <= relative_rms(w, again) * (1 + 1e-6)


def test_mxfp4_is_the_ocps() -> None:
    """Rounding to E2M1 as torch casts to bfloat16 first loses nothing; ties to even, saturating."""
    fmt = FORMATS["mxfp4"]
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.arange(-992, 993) / 128  # -7.75 .. 7.75: scale 1 if the largest is in 4 .. 7
    x = torch.nn.functional.pad(x[x.abs() < 7], (0, 64))
    w = x[: x.numel() // 31 * 31].view(-1, 31)
    w = torch.cat([torch.full((w.shape[0], 1), 6.0), w], dim=1)  # 6 leads each block
    w = torch.nn.functional.pad(w, (0, 32))
    codes = (w.abs().unsqueeze(-1) - grid).abs()
    for pack in (fmt.pack, MXFP4().pack_torch):
        parts = pack(w, search=False)
        assert (parts["scales"][:, 0] == 127).all() and (parts["scales"][:, 1] == 0).all()
        back = fmt.unpack(parts)
        assert torch.equal((back - w).abs(), codes.amin(-1))  # the nearest
        tied = (codes == codes.amin(-1, keepdim=True)).sum(-1) == 2
        assert int(tied.sum()) >= 14
        even = torch.tensor([0.0, 1.0, 2.0, 4.0])
        assert torch.isin(back[tied].abs(), even).all()
        assert torch.equal(back.sign()[back != 0], w.sign()[back != 0])


def test_what_mxfp4_holds_comes_back_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 64), generator=g).to(torch.uint8)
    codes[:, ::16] = 0x7F  # every block holds a 6: the scale is fixed by it
    scales = torch.randint(11, 252, (40, 4), generator=g).to(torch.uint8)
    fmt = FORMATS["mxfp4"]
    w = fmt.unpack({"codes": codes, "scales": scales})
    high, low = codes >> 4, codes & 15
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    signed = torch.cat([value, -value])
    both = signed[torch.stack((high, low), -1).long()].view(40, 4, 32)
    assert torch.equal(w.view(40, 4, 32), both * 2.0 ** (scales.double() - 127).unsqueeze(-1))
    for pack in (fmt.pack, MXFP4().pack_torch):
        for search in (False, True):
            assert torch.equal(fmt.unpack(pack(w, search=search)), w)


def test_mxfp4_loses_a_third_more_than_nf4() -> None:
    """Relative RMS, normal and heavy-tailed (Student's t, 4 degrees of freedom) weights."""
    for make, nf4, mxfp4 in ((gaussian, 0.085, 0.1115), (heavy_tailed, 0.106, 0.128)):
        w = make(256, 2048)
        for name, wanted in (("nf4", nf4), ("mxfp4", mxfp4)):
            fmt = FORMATS[name]
            assert relative_rms(w, fmt.unpack(fmt.pack(w))) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 40])
def test_matmul_is_the_product_with_the_unpacked_weights(name: str, tokens: int) -> None:
    fmt = get_format(name)
    parts = fmt.pack(gaussian(33, 128, seed=2))
    x = gaussian(tokens, 256, seed=3)[:, ::2]  # not contiguous
    wanted = x.double() @ fmt.unpack(parts).double().T
    assert off(fmt.matmul(x, parts), wanted) < (1e-6 if name in ("bf16", "f32") else FEW_ROWS)


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "int8", "bf16"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    if kernels.get() is None:
        pytest.skip("only the kernels promise this")
    fmt = get_format(name)
    parts = fmt.pack(gaussian(48, 192, seed=4))
    x = gaussian(8, 192, seed=5)
    together = fmt.matmul(x, parts)
    for t in range(8):
        assert torch.equal(fmt.matmul(x[t : t + 1], parts)[0], together[t])


def test_work_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = gaussian(37, 128), gaussian(20, 128, seed=1)

    def all_of_it() -> list[torch.Tensor]:
        out = []
        for fmt in TWINS:
            parts: Parts = fmt.pack_torch(w)
            out += [*parts.values(), fmt.unpack_torch(parts)]
            torch.testing.assert_close(fmt.matmul_torch(x, parts), x @ fmt.unpack_torch(parts).T)
        return out

    whole = all_of_it()
    monkeypatch.setattr("quant.formats._CHUNK", 600)
    assert all(torch.equal(a, b) for a, b in zip(whole, all_of_it(), strict=True))


def test_zero_tiny_and_huge_blocks_of_mxfp4() -> None:
    w = torch.zeros(1, 256)
    w[0, 64] = 1e-38  # below the least scale that is used
    w[0, 128] = 3e38
    w[0, 192:] = 2.0**-116
    for pack in (FORMATS["mxfp4"].pack, MXFP4().pack_torch):
        for search in (False, True):
            parts = pack(w, search=search)
            back = FORMATS["mxfp4"].unpack(parts)
            assert not parts["codes"][0, :32].any() and not parts["scales"][0, :2].any()
            assert back.isfinite().all() and back[0, 64] == 0
            assert back[0, 128] == pytest.approx(3e38, rel=0.2)
            assert torch.equal(back[0, 192:], w[0, 192:])


def test_zero_tiny_and_huge_blocks_survive() -> None:
    w = torch.zeros(1, 256)
    w[0, 64] = 1e-9  # its float16 scale would be zero
    w[0, 128] = 1e6  # beyond float16: saturates
    w[0, 192:] = torch.tensor(1.0)
    for pack in (FORMATS["nf4"].pack, NF4().pack_torch):
        parts = pack(w)
        back = FORMATS["nf4"].unpack(parts)
        assert (parts["codes"][0, :32] == 0x77).all() and not back[0, :64].any()
        assert back.isfinite().all()
        assert back[0, 64].abs() <= 2.0**-24 and parts["scales"][0, 1] > 0
        assert back[0, 128] == 65504
        assert torch.equal(back[0, 192:], w[0, 192:])


def test_shapes_a_format_cannot_hold() -> None:
    assert not FORMATS["nf4"].supports(4, 100) and FORMATS["int8"].supports(4, 100)
    with pytest.raises(PackError, match="4 x 100") as e:
        FORMATS["nf4"].pack(torch.ones(4, 100))
    assert "int8" in e.value.hint
    w = gaussian(4, 100)
    assert relative_rms(w, FORMATS["int8"].unpack(FORMATS["int8"].pack(w))) < 0.02


def test_nan_weights_are_refused_by_the_twins() -> None:
    for fmt in TWINS:
        with pytest.raises(PackError, match="NaN"):
            fmt.pack_torch(torch.full((2, 64), float("nan")))


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(PackError, match="nf5") as e:
        get_format("nf5")
    assert "nf4" in e.value.hint
