"""`mimo_moe` and `mimo_route`: against torch, alone and in company, with any number of threads."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels, ops
from mimo_local.config import ModelConfig
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


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("t", [2, 5, 8])
def test_a_row_alone_and_in_company_is_the_same_bits(
    library: kernels.Kernels, fmt: str, t: int
) -> None:
    x, ids, w = step(t, 4, seed=t)
    layer = LAYERS[fmt]
    library.set_threads(1)
    alone = [layer.run(library, x[i : i + 1], ids[i : i + 1], w[i : i + 1]) for i in range(t)]
    for threads in range(1, 6):
        library.set_threads(threads)
        assert torch.equal(layer.run(library, x, ids, w), torch.cat(alone))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("t", [9, 64, 600])
def test_threads_and_the_order_of_ids_change_no_bit(
    library: kernels.Kernels, fmt: str, t: int
) -> None:
    """600 rows of one expert are cut into two groups, and a step into waves when there are more."""
    x, ids, w = step(t, 3, seed=t)
    layer = LAYERS[fmt]
    library.set_threads(1)
    expected = layer.run(library, x, ids, w)
    for threads in range(2, 6):
        library.set_threads(threads)
        assert torch.equal(layer.run(library, x, ids, w), expected)
    turned = torch.tensor([2, 0, 1])
    again = layer.run(library, x, ids[:, turned].contiguous(), w[:, turned].contiguous())
    assert torch.equal(again, expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_edges_of_a_step(library: kernels.Kernels, fmt: str) -> None:
    layer = LAYERS[fmt]
    x, ids, w = step(12, 2, seed=1)
    nobody = torch.full_like(ids, -1)
    assert layer.run(library, x, nobody, w).eq(0).all()
    y = torch.randn(12, D)
    assert torch.equal(layer.run(library, x, nobody, w, y), y)
    everybody = torch.full((12, 1), 3, dtype=torch.int32)
    first = w[:, :1].contiguous()
    check(fmt, layer.run(library, x, everybody, first), layer.wanted(x, everybody, first))
    ones = torch.ones(12, 1)
    dense = layer.wanted(x, torch.zeros(12, 1, dtype=torch.int32), ones)
    check(fmt, layer.run(library, x, None, None), dense)
    assert layer.run(library, x[:0], ids[:0], w[:0]).shape == (0, D)
    with pytest.raises(NativeError, match="moe"):
        layer.run(library, x, torch.full_like(ids, EXPERTS), w)


def test_matrices_of_one_expert_may_be_of_several_formats(library: kernels.Kernels) -> None:
    mixed = Layer("int8")
    for e in range(EXPERTS):
        for name, fmt in (("gate", "nf4"), ("up", "f32"), ("down", "bf16")):
            setattr(mixed.mlps[e], name, getattr(LAYERS[fmt].mlps[e], name))
        mixed.exact[e] = [LAYERS[f].exact[e][i] for i, f in enumerate(("nf4", "f32", "bf16"))]
    for t in (1, 8, 50):
        x, ids, w = step(t, 3, seed=t)
        check("nf4", mixed.run(library, x, ids, w), mixed.wanted(x, ids, w))


# ---- the router ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Shape:
    """What `ops.route` reads of a config."""

    n_group: int = 1
    topk_group: int = 1
    experts_per_token: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


def elected(
    k: kernels.Kernels, shape: Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mimo_route` with tensors."""
    t, chosen = x.shape[0], shape.experts_per_token
    router = kernels.Router(
        weight.data_ptr(), bias.data_ptr(), weight.shape[0], weight.shape[1], chosen,
        shape.n_group, shape.topk_group, shape.norm_topk_prob, shape.routed_scaling_factor, 0.0,
    )  # fmt: skip
    ids, w = torch.empty(t, chosen, dtype=torch.int32), torch.empty(t, chosen)
    k.call(
        "route", ctypes.byref(router), x.data_ptr(), x.stride(0), t, ids.data_ptr(), w.data_ptr()
    )
    return ids, w


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.sampled_from([(1, 1), (4, 2), (8, 3), (2, 2)]), st.booleans(),
    st.sampled_from([1.0, 2.5]), st.integers(0, 999),
)  # fmt: skip
def test_the_router_elects_whom_torch_elects(
    library: kernels.Kernels, t: int, groups: tuple[int, int], norm: bool, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(t, 48, generator=g), torch.randn(32, 48, generator=g) / 7
    bias = torch.randn(32, generator=g) / 10
    shape = Shape(*groups, norm_topk_prob=norm, routed_scaling_factor=scale)
    theirs, their_w = ops.route(x, weight, bias, cast("ModelConfig", shape))
    order = theirs.argsort(1)
    ids, w = elected(library, shape, x, weight, bias)
    assert torch.equal(ids.long(), theirs.gather(1, order))
    torch.testing.assert_close(w, their_w.gather(1, order), rtol=1e-5, atol=1e-7)


def test_of_equals_the_lower_id_is_elected(library: kernels.Kernels) -> None:
    """All scores are 0.5 and all biases but three the same: ids as a stable sort has them."""
    bias = torch.zeros(32)
    bias[[30, 7, 19]] = 1.0
    ids, w = elected(library, Shape(), torch.zeros(2, 48), torch.randn(32, 48), bias)
    assert ids.tolist() == [[0, 7, 19, 30]] * 2 and w.eq(0.25).all()
    grouped = Shape(n_group=8, topk_group=2)
    ids, _ = elected(library, grouped, torch.zeros(1, 48), torch.randn(32, 48), bias)
    assert ids.tolist() == [[4, 5, 7, 19]]  # groups of 4: 1, 4 and 7 are equally strong


def test_the_routers_bits_do_not_depend_on_company_or_threads(library: kernels.Kernels) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(8, 520, generator=g), torch.randn(256, 520, generator=g) / 20
    bias = torch.randn(256, generator=g) / 10
    shape = Shape(experts_per_token=8)
    library.set_threads(1)
    alone = [elected(library, shape, x[i : i + 1], weight, bias) for i in range(8)]
    for threads in (1, 2, 5):
        library.set_threads(threads)
        for some in (slice(0, 8), slice(2, 5)):
            ids, w = elected(library, shape, x[some], weight, bias)
            assert torch.equal(ids, torch.cat([a[0] for a in alone[some]]))
            assert torch.equal(w, torch.cat([a[1] for a in alone[some]]))


def test_a_router_that_cannot_be_is_refused(library: kernels.Kernels) -> None:
    x, weight, bias = torch.randn(1, 48), torch.randn(32, 48), torch.randn(32)
    for shape in (Shape(experts_per_token=33), Shape(n_group=5), Shape(8, 1, 5), Shape(8, 9)):
        with pytest.raises(NativeError, match="route"):
            elected(library, shape, x, weight, bias)
