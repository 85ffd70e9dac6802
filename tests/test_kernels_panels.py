"""Products of more rows than the rows path takes: error bounds per format, company, threads.

What every table computes bit for bit is checked in tests/native/panels_test.cpp; here the whole
way through `mimo_matmul` and how far its results are from exact ones.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels

torch.set_num_threads(1)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FORMATS = {
    "nf4": kernels.NF4,
    "mxfp4": kernels.MXFP4,
    "int8": kernels.INT8,
    "bf16": kernels.BF16,
    "f32": kernels.F32,
}
Parts = tuple[torch.Tensor, torch.Tensor | None]
MANY = 17  # rows: from here on every table takes panels, or never does


@pytest.fixture(scope="session")
def library() -> kernels.Kernels:
    found = kernels.get()
    if found is None:
        pytest.skip(kernels.why_unavailable())
    return found


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(library: kernels.Kernels, name: str, w: torch.Tensor) -> Parts:
    rows, cols = w.shape
    if name == "f32":
        return w, None
    if name == "bf16":
        return w.bfloat16(), None
    if name == "mxfp4":
        generator = torch.Generator().manual_seed(rows)
        codes = torch.randint(256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
        shape = (rows, cols // 32)
        return codes, torch.randint(116, 124, shape, dtype=torch.uint8, generator=generator)
    if name == "nf4":
        codes, scales = (
            torch.empty(rows, cols // 2, dtype=torch.uint8),
            torch.empty(rows, cols // 64),
        )
        scales = scales.half()
    else:
        codes, scales = torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows)
    out = codes.data_ptr(), scales.data_ptr()
    library.quantize(FORMATS[name], w.data_ptr(), rows, cols, *out, False)
    return codes, scales


def exact(library: kernels.Kernels, name: str, parts: Parts, cols: int) -> torch.Tensor:
    codes, scales = parts
    if name in ("bf16", "f32") or scales is None:
        return codes.double()
    if name == "mxfp4":
        index = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).long()
        return E2M1.double()[index] * torch.exp2(scales.double() - 127).repeat_interleave(32, dim=1)
    out = torch.empty(codes.shape[0], cols)
    w = kernels.Matrix(codes.data_ptr(), scales.data_ptr(), codes.shape[0], cols, FORMATS[name])
    library.dequantize(w, out.data_ptr())
    return out.double()


def matmul(library: kernels.Kernels, name: str, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    codes, scales = parts
    rows, cols = codes.shape[0], x.shape[1]
    y = torch.full((x.shape[0], rows + 1), float("nan"))  # ldy > N: the last column must stay
    scales_ptr = None if scales is None else scales.data_ptr()
    w = kernels.Matrix(codes.data_ptr(), scales_ptr, rows, cols, FORMATS[name])
    library.matmul(w, x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), rows + 1)
    assert y[:, rows].isnan().all()
    return y[:, :rows]


def outliers(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Normal activations with eight of 20 to 80 sigma in each row."""
    x = normal(rows, cols, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for row in x:
        row[torch.randperm(cols, generator=generator)[:8]] *= 20 + 60 * torch.rand(
            8, generator=generator
        )
    return x


# Relative rms of a row's products against exact ones with the same stored weights: on normal
# activations and on ones with outliers. NF4 itself loses 9e-2 of normal weights, MXFP4 more.
# 8 bits a block of 64 lose sqrt(E max^2 / 12) / 127 = 6.0e-3 of a normal row, NF4's code table
# 4.9e-3 more, squares added: 7.7e-3. Of N products such an rms is measured to 1 / sqrt(N): a tenth
# with 96, which was once taken for a difference between rows; hence the 1024 rows of W.
WORDS = {"nf4": (7e-4, 3e-3), "mxfp4": (7e-4, 3e-3), "int8": (7e-4, 3e-3)}
BYTES = {"nf4": (9e-3, 2e-2), "mxfp4": (7e-3, 2e-2), "int8": (7e-3, 2e-2)}
TILES = {"nf4": (1.4e-2, 3.6e-2), "mxfp4": (1.7e-2, 3.6e-2), "int8": (1e-2, 3.6e-2)}
PLAIN = {"bf16": (5e-7, 5e-7), "f32": (5e-7, 5e-7)}
BOUNDS = {"scalar": WORDS | PLAIN, "avx2": WORDS | PLAIN, "avx_vnni": BYTES | PLAIN}
BOUNDS |= {"avx512": BYTES | PLAIN, "amx": TILES | PLAIN}


@pytest.mark.parametrize("name", FORMATS)
def test_error_of_long_products(library: kernels.Kernels, name: str) -> None:
    parts = stored(library, name, normal(1024, 4096, seed=9) * 0.02)
    w = exact(library, name, parts, 4096)
    for isa in library.isas:
        for i, x in enumerate((normal(MANY, 4096, seed=1), outliers(MANY, 4096, seed=2))):
            expected = x.double() @ w.T
            y = matmul(library.with_isa(isa), name, x, parts)
            bound = BOUNDS[isa][name][i]
            worst = ((y - expected).norm(dim=1) / expected.norm(dim=1)).max()
            assert worst < bound, (isa, worst)


@st.composite
def products(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
    name = draw(st.sampled_from(sorted(FORMATS)))
    blocked = name in ("nf4", "mxfp4")
    cols = draw(st.sampled_from([64, 192, 256, 576] if blocked else [1, 17, 64, 127, 300, 513]))
    rows = draw(st.sampled_from([1, 15, 16, 63, 64, 65, 130]))
    return name, rows, cols, draw(st.integers(MANY, 40)), draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(case=products(), threads=st.integers(1, 3))
def test_a_row_depends_on_nothing_but_itself(
    library: kernels.Kernels, case: tuple[str, int, int, int, int], threads: int
) -> None:
    """Not on the rows beside it, their number, or the threads; and it is about right."""
    name, rows, cols, batch, seed = case
    parts = stored(library, name, normal(rows, cols, seed=seed))
    x = normal(batch, cols + 3, seed=seed + 1)[:, :cols]
    before = library.threads
    library.set_threads(threads)
    together = matmul(library, name, x, parts)
    library.set_threads(1)
    less = matmul(library, name, x[-MANY:], parts)
    library.set_threads(before)
    assert torch.equal(together[-MANY:], less)
    expected = x.double() @ exact(library, name, parts, cols).T
    assert (together - expected).norm() <= 2.5e-2 * expected.norm()


def test_tables_with_the_same_rounding_agree(library: kernels.Kernels) -> None:
    x = outliers(MANY, 320, seed=3)
    for name in FORMATS:
        parts = stored(library, name, normal(70, 320, seed=4))
        for family in (("scalar", "avx2"), ("avx_vnni", "avx512")):
            here = [isa for isa in family if isa in library.isas]
            found = [matmul(library.with_isa(isa), name, x, parts) for isa in here]
            assert all(torch.equal(y, found[0]) for y in found)


def test_what_is_not_finite_stays_in_its_row(library: kernels.Kernels) -> None:
    x = normal(MANY, 256, seed=5)
    x[3, 100] = float("nan")
    x[7, 200] = float("inf")
    x[9] = 0
    for name in FORMATS:
        parts = stored(library, name, normal(20, 256, seed=6))
        y = matmul(library, name, x, parts)
        good = [t for t in range(MANY) if t not in (3, 7)]
        assert not y[[3, 7]].isfinite().any()
        assert y[good].isfinite().all()
        assert y[9].eq(0).all()
