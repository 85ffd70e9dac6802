"""The kernel library. Every table against scalar bit for bit, scalar against torch.

The native part (tests/native) is compiled here with sanitizers, AVX-512 emulated.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels
from mimo_local.errors import NativeError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "mimo_local" / "kernels"
NATIVE = Path(__file__).parent / "native"
CHECKS = [
    "matmul_nf4",
    "matmul_mxfp4",
    "matmul_int8",
    "matmul_plain",
    "products_orders",
    "odd_activations",
    "e8m0_ends",
    "moe",
    "moe_waves",
    "moe_panels",
    "pieces",
    "moe_arguments",
    "route",
    "quantize",
    "quantize_fp8",
    "dequantize",
    "dequantize_large",
    "scalar_fma",
    "halves",
    "threads",
    "homes",
    "fork",
    "arguments",
    "exponential",
    "elementwise",
    "rotation",
    "bf16_rows",
    "int8_heads",
    "attention",
    "not_finite",
    "panels_nf4",
    "panels_mxfp4",
    "panels_int8",
    "panels_plain",
    "panels_company",
    "panels_ends",
    "panels_peak",
    "limits",
]
Parts = tuple[torch.Tensor, torch.Tensor]
CODES = {
    "nf4": kernels.NF4,
    "mxfp4": kernels.MXFP4,
    "int8": kernels.INT8,
    "bf16": kernels.BF16,
    "f32": kernels.F32,
}

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library() -> kernels.Kernels:
    found = kernels.get()
    if found is None:
        pytest.skip(kernels.why_unavailable())
    return found


@pytest.fixture
def tables(library: kernels.Kernels) -> list[kernels.Kernels]:
    """Every table this CPU can run, scalar first."""
    return [library.with_isa(name) for name in library.isas]


# ---- calling with tensors -----------------------------------------------------------------------


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantize(k: kernels.Kernels, name: str, w: torch.Tensor, *, search: bool) -> Parts:
    rows, cols = w.shape
    if name == "nf4":
        codes = torch.empty(rows, cols // 2, dtype=torch.uint8)
        scales = torch.empty(rows, cols // 64, dtype=torch.float16)
    else:
        codes = torch.empty(rows, cols, dtype=torch.int8)
        scales = torch.empty(rows)
    out = codes.data_ptr(), scales.data_ptr()
    k.quantize(CODES[name], w.data_ptr(), rows, cols, *out, search)
    return codes, scales


def addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def dequantize(k: kernels.Kernels, name: str, parts: Parts, cols: int) -> torch.Tensor:
    codes, scales = parts
    out = torch.empty(codes.shape[0], cols)
    w = kernels.Matrix(codes.data_ptr(), scales.data_ptr(), codes.shape[0], cols, CODES[name])
    k.dequantize(w, out.data_ptr())
    return out


def weights(name: str, rows: int, cols: int, seed: int) -> Parts:
    """Random stored weights with scales of a usual size; bf16 and f32 have no second part."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("bf16", "f32"):
        w = random(rows, cols, seed=seed)
        return w.bfloat16() if name == "bf16" else w, torch.empty(0)
    if name == "int8":
        codes = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
        return codes, torch.rand(rows, generator=generator) * 0.03
    codes = torch.randint(256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    if name == "mxfp4":
        shape = (rows, cols // 32)
        return codes, torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
    return codes, (torch.rand(rows, cols // 64, generator=generator) * 0.03).half()


def matmul(k: kernels.Kernels, name: str, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    rows, cols = parts[0].shape[0], x.shape[1]
    y = torch.full((x.shape[0], rows + 1), float("nan"))  # ldy > N: the last column must stay
    scales = parts[1].data_ptr() if parts[1].numel() else None
    w = kernels.Matrix(parts[0].data_ptr(), scales, rows, cols, CODES[name])
    k.matmul(w, x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), rows + 1)
    assert y[:, rows].isnan().all()
    return y[:, :rows]


def nf4_values() -> torch.Tensor:
    functional = pytest.importorskip("bitsandbytes.functional")
    values: torch.Tensor = functional.get_4bit_type("nf4", device="cpu")
    return values


def nf4_unpack(parts: Parts) -> torch.Tensor:
    """Written from the format's definition: element 2i in the high nibble, 64 weights a scale."""
    codes, scales = parts
    index = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).long()
    return nf4_values()[index] * scales.float().repeat_interleave(64, dim=1)


def mxfp4_unpack(parts: Parts) -> torch.Tensor:
    codes, scales = parts
    index = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).long()
    return E2M1[index] * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)


def exact(name: str, parts: Parts) -> torch.Tensor:
    if name == "mxfp4":
        return mxfp4_unpack(parts)
    if name == "nf4":
        return nf4_unpack(parts)
    if name == "int8":
        return parts[0].float() * parts[1][:, None]
    return parts[0].float()


# ---- products -----------------------------------------------------------------------------------

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NAMES = ["nf4", "mxfp4", "int8", "bf16", "f32"]
FORMATS = st.sampled_from(NAMES)
ROWS = st.sampled_from([1, 3, 4, 5, 17, 40])


@st.composite
def products(draw: st.DrawFn) -> tuple[str, torch.Tensor, Parts]:
    name = draw(FORMATS)
    four_bit = name in ("nf4", "mxfp4")
    columns = [64, 128, 192, 576, 1088] if four_bit else [1, 7, 15, 16, 17, 64, 65, 576, 1100]
    rows, cols, seed = draw(ROWS), draw(st.sampled_from(columns)), draw(st.integers(0, 999))
    batch = draw(st.integers(1, 8))  # of the rows path; longer steps: test_kernels_panels.py
    padded = random(batch, cols + draw(st.integers(0, 3)), seed=seed)  # ldx >= K
    return name, padded[:, :cols], weights(name, rows, cols, seed)


def rounding(name: str, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """How far a product (T, N) may be from the exact one.

    Half a step of the int8 code of every activation (64 share a step, their largest / 127), half a
    step of NF4's code table (1 / 112.08 of a scale), and the rounding of float32 sums.
    """
    magnitude, w = x.double().abs(), exact(name, parts).double().abs()
    bound = 2e-7 * (x.shape[1] + 8) ** 0.5 * (magnitude @ w.T) + 1e-30
    if name in ("bf16", "f32"):
        return bound
    padding = -x.shape[1] % 64
    blocks = torch.nn.functional.pad(magnitude, (0, padding)).unflatten(1, (-1, 64)).amax(-1)
    columns = torch.nn.functional.pad(w, (0, padding)).unflatten(1, (-1, 64)).sum(-1)
    bound += 1.001 * 0.5 / 127 * blocks @ columns.T
    if name == "nf4":
        scales = parts[1].double().repeat_interleave(64, dim=1)
        bound += 1.001 * 0.5 / 112.08 * magnitude @ scales.T
    return bound


@settings(max_examples=60, deadline=None)
@given(case=products())
def test_product_is_x_times_dequantized_weights(
    library: kernels.Kernels, case: tuple[str, torch.Tensor, Parts]
) -> None:
    name, x, parts = case
    w = exact(name, parts).double()
    expected = x.double() @ w.T
    bound = rounding(name, x, parts)
    scalar = matmul(library.with_isa("scalar"), name, x, parts)
    assert ((scalar - expected).abs() <= bound).all()
    for isa in library.isas[1:]:
        assert torch.equal(matmul(library.with_isa(isa), name, x, parts), scalar), isa


@settings(max_examples=30, deadline=None)
@given(case=products(), threads=st.integers(1, 4))
def test_a_row_does_not_depend_on_its_company_or_the_threads(
    library: kernels.Kernels, case: tuple[str, torch.Tensor, Parts], threads: int
) -> None:
    name, x, parts = case
    before = library.threads
    library.set_threads(threads)
    together = matmul(library, name, x, parts)
    library.set_threads(1)
    alone = torch.cat([matmul(library, name, x[t : t + 1], parts) for t in range(len(x))])
    library.set_threads(before)
    assert torch.equal(together, alone)


def outliers(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Normal activations with eight of 20 to 80 sigma in each row."""
    x = random(rows, cols, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for row in x:
        row[torch.randperm(cols, generator=generator)[:8]] *= 20 + 60 * torch.rand(8)
    return x


@pytest.mark.parametrize(
    ("name", "normal", "spiky"),
    [
        ("nf4", 8.5e-3, 2.2e-2),
        ("mxfp4", 7e-3, 2.2e-2),
        ("int8", 7e-3, 2.2e-2),
        ("bf16", 5e-7, 5e-7),
        ("f32", 5e-7, 5e-7),
    ],
)
def test_error_of_long_products(
    library: kernels.Kernels, name: str, normal: float, spiky: float
) -> None:
    """Relative rms over a row of products, K = 4096: the figures docs and comments state."""
    w = random(256, 4096, seed=9, scale=0.02)
    parts = weights(name, 256, 4096, seed=9)
    if name in ("nf4", "int8"):
        parts = quantize(library, name, w, search=True)
    for x, limit in ((random(4, 4096, seed=1), normal), (outliers(4, 4096, seed=2), spiky)):
        expected = x.double() @ exact(name, parts).double().T
        error = (matmul(library, name, x, parts) - expected).norm(dim=1) / expected.norm(dim=1)
        assert (error < limit).all(), error
        assert name in ("bf16", "f32") or (error > limit / 4).all(), "the bound says nothing"


@pytest.mark.parametrize("name", NAMES)
def test_many_threads_and_many_callers_give_the_same_bits(
    library: kernels.Kernels, name: str
) -> None:
    """Big enough to be cut into many pieces; 70 rows go through panels."""
    parts = weights(name, 1030, 1024, seed=3)
    x = random(70, 1024, seed=4)
    before = library.threads
    library.set_threads(1)
    expected = matmul(library, name, x, parts)
    for threads in (2, 3, 4):
        library.set_threads(threads)
        assert torch.equal(matmul(library, name, x, parts), expected)
    few = matmul(library, name, x[:3], parts)
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: matmul(library, name, x[:3], parts), range(12)))
    library.set_threads(before)
    assert all(torch.equal(y, few) for y in results)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nf4", "b1ea21022d1f71f1"), ("mxfp4", "231190a6d21181fd"), ("int8", "f2b036298a4c6ead")],
)
def test_results_are_fixed_for_ever(library: kernels.Kernels, name: str, expected: str) -> None:
    """The order of operations is a promise: saved answers reproduce on any machine and version."""
    x = (torch.arange(3 * 128) % 23 - 11).float().reshape(3, 128) / 7
    codes = (torch.arange(5 * 128) * 37 % 256).to(torch.uint8).reshape(5, 128)
    scales = (torch.arange(20) % 7 + 1).reshape(5, 4)
    parts = {
        "nf4": (codes[:, :64].contiguous(), (scales[:, :2] / 100).half()),
        "mxfp4": (codes[:, :64].contiguous(), (scales + 115).to(torch.uint8)),
        "int8": (codes.view(torch.int8), scales[:, 0] / 100),
    }[name]
    digest = hashlib.sha256(matmul(library, name, x, parts).numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


def test_nothing_outside_the_buffers_is_touched(tables: list[kernels.Kernels]) -> None:
    """Every buffer ends where an unreadable page begins: one byte too far kills this process."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    maps = []

    def at_end(tensor: torch.Tensor) -> int:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        pages = -(-data.numel() // page)
        area = mmap.mmap(-1, (pages + 1) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        address = base + pages * page - data.numel()
        ctypes.memmove(address, data.data_ptr(), data.numel())
        guard = ctypes.c_void_p(base + pages * page)
        assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0
        maps.append((area, guard))
        return address

    for k in tables:
        for rows, cols in ((1, 64), (3, 64), (5, 192)):
            codes, scales = weights("nf4", rows, cols, seed=rows)
            x, w, y = random(2, cols, seed=1), random(rows, cols, seed=2), torch.zeros(2, rows)
            c, s = at_end(codes), at_end(scales)
            stored = kernels.Matrix(c, s, rows, cols, kernels.NF4)
            k.matmul(stored, at_end(x), cols, 2, at_end(y), rows)
            k.dequantize(stored, at_end(w))
            k.quantize(kernels.NF4, at_end(w), rows, cols, c, s, True)
        for rows, cols in ((1, 1), (3, 7), (5, 65), (4, 576)):
            codes, scales = weights("int8", rows, cols, seed=rows)
            x, w, y = random(3, cols, seed=1), random(rows, cols, seed=2), torch.zeros(3, rows)
            c, s = at_end(codes), at_end(scales)
            stored = kernels.Matrix(c, s, rows, cols, kernels.INT8)
            k.matmul(stored, at_end(x), cols, 3, at_end(y), rows)
            plain = kernels.Matrix(at_end(w.bfloat16()), None, rows, cols, kernels.BF16)
            k.matmul(plain, at_end(x), cols, 3, at_end(y), rows)
            k.dequantize(stored, at_end(w))
            k.quantize(kernels.INT8, at_end(w), rows, cols, c, s, True)
    for n in (1, 15, 16, 255, 256, 320, 331):
        data = torch.zeros(n, dtype=torch.uint8)
        assert tables[0].crc32(at_end(data), n) == zlib.crc32(bytes(n))
    for _, guard in maps:
        libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


# ---- quantisers ---------------------------------------------------------------------------------


def tensor_of(kind: str, rows: int, cols: int, seed: int) -> torch.Tensor:
    w = random(rows, cols, seed=seed, scale=0.02)
    if kind == "heavy":
        w = w * random(rows, cols, seed=seed + 1).abs().pow(2)
    elif kind == "uniform":
        w = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) - 0.5
    elif kind == "outliers":
        w[:, ::61] *= 30
    elif kind == "tiny":
        w = w * 1e-4
    elif kind == "sparse":
        w[:, 64:128] = 0
        w[::3] = 0
    return w


KINDS = ["normal", "heavy", "uniform", "outliers", "tiny", "sparse"]


def squared_errors(name: str, w: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Squared error of each group that shares a scale, in float64."""
    error = (w.double() - exact(name, parts).double()).square()
    return error.reshape(-1, 64 if name == "nf4" else w.shape[1]).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_codes_are_nearest_and_search_is_never_worse(
    tables: list[kernels.Kernels], name: str, kind: str
) -> None:
    rows, cols = (23, 256) if name == "nf4" else (23, 261)
    w = tensor_of(kind, rows, cols, seed=7)
    plain = quantize(tables[-1], name, w, search=False)
    best = quantize(tables[-1], name, w, search=True)
    assert torch.equal(dequantize(tables[-1], name, plain, cols), exact(name, plain))
    grid = nf4_values() if name == "nf4" else torch.arange(-127.0, 128.0)
    for codes, scales in (plain, best):
        scale = scales.float().repeat_interleave(64, 1) if name == "nf4" else scales[:, None]
        nearest = (w[..., None].double() - grid.double() * scale[..., None].double()).abs().amin(-1)
        error = (w.double() - exact(name, (codes, scales)).double()).abs()
        # Of w / scale (to a multiple of 1/32767 for nf4) and of code * scale.
        rounding = 2.0**-15 + 2e-6 if name == "nf4" else 127 * 2.0**-22
        assert (error <= nearest + rounding * scale.double()).all()
    assert (squared_errors(name, w, best) <= squared_errors(name, w, plain)).all()
    groups = w.reshape(rows, -1, 64) if name == "nf4" else w
    largest = groups.abs().amax(-1)
    assert torch.equal(plain[1], largest.half() if name == "nf4" else largest / 127)
    for k in tables[:-1]:
        for search, parts in ((False, plain), (True, best)):
            again = quantize(k, name, w, search=search)
            assert torch.equal(again[0], parts[0]) and torch.equal(again[1], parts[1]), k.isa


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_loses_no_more_than_bitsandbytes_and_is_read_by_it(
    library: kernels.Kernels, kind: str
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = tensor_of(kind, 64, 512, seed=11)
    codes, scales = parts = quantize(library, "nf4", w, search=True)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    theirs = (w - functional.dequantize_4bit(packed, state)).double().square().sum()
    ours = squared_errors("nf4", w, parts).sum()
    assert ours <= 0.99 * theirs
    state.absmax = scales.float().flatten()
    read = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    assert torch.equal(read, dequantize(library, "nf4", parts, 512))


def test_search_gains_what_it_costs(library: kernels.Kernels) -> None:
    w = random(64, 2048, seed=5, scale=0.02)
    plain, best = (
        squared_errors("nf4", w, quantize(library, "nf4", w, search=search)).sum()
        for search in (False, True)
    )
    assert best < 0.87 * plain  # 0.857 on normal weights


def test_zeros_subnormals_and_values_beyond_fp16(tables: list[kernels.Kernels]) -> None:
    w = torch.zeros(5, 64)
    w[1] = 1e-40
    w[2] = 1e-8  # below half of fp16's smallest subnormal: the scale must not become zero
    w[3, 5] = -1e6
    w[4] = torch.finfo(torch.float32).max
    for k in tables:
        codes, scales = torch.empty(5, 32, dtype=torch.uint8), torch.empty(5, 1).half()
        assert k.quantize(kernels.NF4, w.data_ptr(), 5, 64, *addresses(codes, scales), True) == 2
        assert scales.flatten().tolist()[3:] == [65504.0, 65504.0]
        back = dequantize(k, "nf4", (codes, scales), 64)
        assert back[0].eq(0).all() and back[3, 5] == -65504 and back[4].eq(65504).all()
        assert (back[2] - w[2]).abs().max() < 1e-8
        int8 = dequantize(k, "int8", quantize(k, "int8", w, search=True), 64)
        assert int8[0].eq(0).all() and int8.isfinite().all()
        assert (int8[2:] / w[2:] - 1)[w[2:] != 0].abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_their_row(library: kernels.Kernels, bad: float) -> None:
    w = random(300, 128, seed=1)
    w[200, 127] = bad
    for name in ("nf4", "int8"):
        with pytest.raises(NativeError, match="row 200 of 300"):
            quantize(library, name, w, search=True)


# ---- checksum -----------------------------------------------------------------------------------


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**32 - 1), skip=st.integers(0, 3))
def test_crc32_is_zlibs(library: kernels.Kernels, data: bytes, seed: int, skip: int) -> None:
    buffer = ctypes.create_string_buffer(bytes(skip) + data, skip + len(data) or 1)
    address = ctypes.addressof(buffer) + skip
    assert library.crc32(address, len(data), seed) == zlib.crc32(data, seed)


@pytest.mark.parametrize("n", [255, 256, 257, 319, 320, 1000, 65537])
def test_crc32_of_long_runs(library: kernels.Kernels, n: int) -> None:
    data = random(n // 4 + 1, seed=n).numpy().tobytes()[:n]
    buffer = ctypes.create_string_buffer(data, n)
    address = ctypes.addressof(buffer)
    whole = zlib.crc32(data)
    assert library.crc32(address, n) == whole
    assert library.crc32(address + 77, n - 77, library.crc32(address, 77)) == whole


# ---- arguments, environment, loading ------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_ptr": 0}, "x_ptr is null"),
        ({"scales_ptr": None}, "scales_ptr is null"),
        ({"x_ptr": 2}, "x_ptr=0x2 is not aligned to 4 bytes"),
        ({"scales_ptr": 3}, "scales_ptr=0x3 is not aligned to 2 bytes"),
        ({"T": -1}, "T=-1 is out of range"),
        ({"K": 0}, "K=0 is out of range"),
        ({"K": 96}, "K=96 is not a multiple of 64"),
        ({"ldx": 63}, "ldx=63 is less than a row of 64"),
        ({"ldy": 2}, "ldy=2 is less than a row of 3"),
        ({"N": 2**59, "ldy": 2**59}, "beyond the address space"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(
    library: kernels.Kernels, change: dict[str, int], message: str
) -> None:
    good = {"x_ptr": 64, "ldx": 64, "T": 1, "codes_ptr": 64, "scales_ptr": 64}
    good |= {"N": 3, "K": 64, "y_ptr": 64, "ldy": 3}
    given = good | change
    stored = [given.pop(name) for name in ("codes_ptr", "scales_ptr", "N", "K")]
    with pytest.raises(NativeError, match=message) as caught:
        library.matmul(kernels.Matrix(*stored, kernels.NF4), **given)
    assert caught.value.hint


def test_thread_counts_and_tables_out_of_range_are_refused(library: kernels.Kernels) -> None:
    for n in (0, -1, 257):
        with pytest.raises(NativeError, match=f"{n} threads"):
            library.set_threads(n)
    with pytest.raises(NativeError, match="mmx"):
        library.with_isa("mmx")
    assert 1 <= library.default_threads <= (os.cpu_count() or 1)


def fresh(code: str, **environment: str) -> str:
    """Runs code in a new interpreter, where the library is loaded anew."""
    done = subprocess.run(
        [sys.executable, "-c", "from mimo_local import kernels\n" + code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_mimo_isa_lowers_and_never_raises(library: kernels.Kernels) -> None:
    ask = "k = kernels.get(); print(k.isa, *k.notes, sep='|')"
    assert fresh(ask, MIMO_ISA="") == library.isas[-1]
    for isa in library.isas:
        assert fresh(ask, MIMO_ISA=isa) == isa
    for wrong in {"avx512", "neon"} - set(library.isas):
        isa, note = fresh(ask, MIMO_ISA=wrong).split("|")
        assert isa == library.isas[-1] and wrong in note


def test_mimo_threads_sets_the_pool_or_leaves_a_note(library: kernels.Kernels) -> None:
    ask = "k = kernels.get(); print(k.threads, *k.notes, sep='|')"
    assert fresh(ask, MIMO_THREADS="3") == "3"
    threads, note = fresh(ask, MIMO_THREADS="lots").split("|")
    assert int(threads) == library.default_threads and "MIMO_THREADS=lots" in note


def test_switched_off_and_light_to_import() -> None:
    ask = "import sys; print(kernels.get(), kernels.describe(), kernels.why_unavailable(), sep='|')"
    found, described, why = fresh(ask, MIMO_KERNELS="off").split("|")
    assert found == "None" and described == "reference (slow)" and "MIMO_KERNELS=off" in why
    heavy = fresh("import sys; kernels.get(); print({'torch', 'numpy'} & set(sys.modules))")
    assert heavy == "set()"


def test_a_broken_or_older_library_is_a_reason_not_a_crash(
    library: kernels.Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / kernels.LIBRARY
    text.write_text("not a library")
    monkeypatch.setattr(kernels, "_candidates", lambda: iter([text]))
    found, why = kernels._load.__wrapped__()
    assert found is None and "cannot be loaded" in why and str(text) in why
    monkeypatch.setattr(kernels, "_candidates", lambda: iter([library.path]))
    monkeypatch.setattr(kernels, "ABI_VERSION", 999)
    found, why = kernels._load.__wrapped__()
    assert found is None and "needs 999" in why
    monkeypatch.setattr(kernels, "_candidates", lambda: iter([]))
    found, why = kernels._load.__wrapped__()
    assert found is None and "not installed" in why


def test_usable_after_fork(library: kernels.Kernels) -> None:
    code = """
import array, os
k = kernels.get()
k.set_threads(3)
n, cols = 600, 1024
codes, scales = array.array("b", bytes(range(128)) * (n * cols // 128)), array.array("f", [0.5] * n)
x, y = array.array("f", [0.25] * cols), array.array("f", [0.0] * n)
def product():
    at = [a.buffer_info()[0] for a in (x, codes, scales, y)]
    w = kernels.Matrix(at[1], at[2], n, cols, kernels.INT8)
    k.matmul(w, at[0], cols, 1, at[3], n)
    return y.tobytes()
expected = product()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if k.threads == 3 and all(product() == expected for _ in range(5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert product() == expected
print("same")
"""
    assert fresh(code) == "same"


# ---- the native program, sanitized, with AVX-512 emulated ---------------------------------------


@pytest.fixture(scope="session")
def native(request: pytest.FixtureRequest) -> Path:
    """The program of tests/native, built once per state of the sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    files = sorted([*(SOURCES / "src").iterdir(), *NATIVE.iterdir()])
    flags = ["-std=c++20", "-Og", "-g1", "-ffp-contract=off", "-pthread"]
    flags += ["-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    state = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for file in files:
        state.update(file.read_bytes())
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("mimo-native")
    program = folder / f"kernels_test-{state.hexdigest()[:16]}"
    if not program.exists():
        for old in folder.glob("kernels_test-*"):
            old.unlink()
        build(compiler, flags, folder, program)
    return program


def build(compiler: str, flags: list[str], folder: Path, program: Path) -> None:
    units = [f for f in (SOURCES / "src").glob("*.cpp") if f.stem != "isa_scalar"]
    units += sorted(NATIVE.glob("*.cpp"))  # scalar_test.cpp includes isa_scalar.cpp
    flags = [*flags, f"-I{SOURCES / 'src'}", f"-I{NATIVE}", "-DMIMO_EMULATION"]

    def compile_one(unit: Path) -> str:
        target = folder / f"{unit.stem}.o"
        command = [compiler, *flags, "-c", str(unit), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compile_one, units))
    temporary = program.with_suffix(".new")
    subprocess.run([compiler, *flags, *objects, "-o", str(temporary)], check=True)
    temporary.rename(program)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_native(native: Path, check: str) -> None:
    done = subprocess.run([native, check], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_native_check_is_run(native: Path) -> None:
    listed = subprocess.run([native], capture_output=True, text=True, check=False).stdout.split()
    assert sorted(listed) == sorted(CHECKS)


CGROUPS = [
    ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1),
    ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "300000 100000"}, 3),
    ("0::/", {"cpu.max": "50000 100000"}, 1),
    ("0::/../elsewhere", {"cpu.max": "200000 100000"}, 2),
    ("0::/a", {"a/cpu.max": "max 100000"}, 0),
    ("4:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000"}, 4),
    ("4:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1"}, 0),
    ("4:memory:/x", {"memory/cpu.cfs_quota_us": "400000"}, 0),
    ("nonsense", {}, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "files", "expected"), CGROUPS)
def test_cpu_quota(
    native: Path, tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"12:freezer:/\n{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        if name.endswith("quota_us"):
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    done = subprocess.run([native, "cgroup", tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected


@pytest.mark.slow
def test_instruction_sets_do_not_leak(tmp_path: Path) -> None:
    """No weak symbol may leave an isa file: the linker could keep its copy for every CPU."""
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ and nm")
    for isa in ("avx2", "avx_vnni", "avx512", "amx"):
        target = tmp_path / f"{isa}.o"
        source = SOURCES / "src" / f"isa_{isa}.cpp"
        subprocess.run([compiler, "-std=c++20", "-O0", "-c", source, "-o", target], check=True)
        symbols = subprocess.run([nm, "-C", target], capture_output=True, text=True, check=True)
        shared = [line[17:] for line in symbols.stdout.splitlines() if line[17] in "TWVw"]
        functions = [s for s in shared if "personality" not in s]
        assert functions == [f"T mimo::{isa}_table()"]


@pytest.mark.slow
def test_no_compiler_is_a_warning(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake (pip brings it when it builds a wheel)")
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    done = subprocess.run(
        [cmake, "-S", SOURCES, "-B", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "torch reference" in " ".join(done.stderr.split())
