"""`mimo_moe` and `mimo_route`: against torch, alone and in company, with any number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels
from mimo_local.errors import NativeError
from quant.formats import get_format

torch.set_num_threads(1)
D, WIDTH, EXPERTS = 192, 128, 7
FORMATS = ["nf4", "int8", "bf16", "f32"]


@pytest.fixture(scope="module")
def library() -> Iterator[kernels.Kernels]:
    found = kernels.get()
    if found is None:
        pytest.skip(kernels.why_unavailable())
    before = found.threads
    yield found
    found.set_threads(before)


class Layer:
    """Random experts in one format, with the weights they stand for in float64."""

    def __init__(self, fmt: str, *, d: int = D, width: int = WIDTH, n: int = EXPERTS) -> None:
        g = torch.Generator().manual_seed(len(fmt) + d)
        form = get_format(fmt)
        self.d, self.n = d, n
        self.parts, self.exact = [], []
        self.mlps = (kernels.Mlp * n)()
        for e in range(n):
            exact = []
            for name, shape in (("gate", (width, d)), ("up", (width, d)), ("down", (d, width))):
                parts = form.pack(torch.randn(shape, generator=g) * shape[1] ** -0.5, search=False)
                self.parts.append(parts)
                setattr(self.mlps[e], name, form.matrix(parts))
                exact.append(form.unpack(parts).double())
            self.exact.append(exact)

    def wanted(self, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(T, D) float64, expert by expert."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for e, (gate, up, down) in enumerate(self.exact):
            weight = (w * (ids == e)).sum(1, keepdim=True).double()
            rows = x.double()
            out += weight * ((F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
        return out

    def run(
        self,
        k: kernels.Kernels,
        x: torch.Tensor,
        ids: torch.Tensor | None,
        w: torch.Tensor | None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """By the kernels; `y` is added to, else what was in the output before must not show."""
        t = x.shape[0]
        out = torch.full((t, self.d + 3), float("nan"))
        if y is not None:
            out[:, : self.d] = y
        k.call(
            "moe", self.mlps, self.n, x.data_ptr(), x.stride(0), t,
            None if ids is None else ids.data_ptr(), None if w is None else w.data_ptr(),
            1 if ids is None else ids.shape[1], out.data_ptr(), out.stride(0), y is not None,
        )  # fmt: skip
        assert out[:, self.d :].isnan().all()
        return out[:, : self.d]


LAYERS = {fmt: Layer(fmt) for fmt in FORMATS}
"""Made once: packing is slower than what is tested."""


def step(
    t: int, k: int, seed: int, n: int = EXPERTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, D) with a row pitch beyond D, ids (T, K) with some left out, weights."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(t)]).int()
    ids[torch.rand(t, k, generator=g) < 0.1] = -1
    x = torch.randn(t, D + seed % 3, generator=g)[:, :D]
    return x, ids.contiguous(), torch.rand(t, k, generator=g)


def bound(fmt: str) -> float:
    """Error against float64, as a part of the output's own size: the rounding of activations."""
    return {"bf16": 2e-5, "f32": 2e-5}.get(fmt, 3e-2)


def check(fmt: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.isfinite().all()
    assert (got - wanted).norm() <= bound(fmt) * wanted.norm() + 1e-6


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(1, 70), st.integers(1, EXPERTS),
    st.integers(0, 999), st.integers(1, 5),
)  # fmt: skip
def test_moe_is_the_weighted_sum_of_the_chosen(
    library: kernels.Kernels, fmt: str, t: int, k: int, seed: int, threads: int
) -> None:
    library.set_threads(threads)
    x, ids, w = step(t, k, seed)
    layer = LAYERS[fmt]
    wanted = layer.wanted(x, ids, w)
    got = layer.run(library, x, ids, w)
    check(fmt, got, wanted)
    y = torch.randn(t, D)
    check(fmt, layer.run(library, x, ids, w, y), wanted + y)
