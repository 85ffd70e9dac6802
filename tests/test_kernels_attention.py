"""Attention and norms of the kernel library: against the torch reference, alone and in company."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels, ops
from mimo_local.blocks import KV_DTYPES
from mimo_local.cache_layers import View, coded
from mimo_local.errors import NativeError

torch.set_num_threads(1)
EXACT_ROWS = 8
KINDS = tuple(KV_DTYPES)


@pytest.fixture(scope="session")
def library() -> kernels.Kernels:
    found = kernels.get()
    if found is None:
        pytest.skip(kernels.why_unavailable())
    return found


@dataclass
class Case:
    """One sequence: q (T, H, dk), k (S, G, dk), v (S, G, dv), row 0 of k at position `first`.

    k and v may be int8 with scales (S, G).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    first: int
    window: int = 0
    sink: torch.Tensor | None = None
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    @property
    def start(self) -> int:
        return self.first + len(self.k) - len(self.q)

    @property
    def view(self) -> View:
        return View(self.k, self.v, self.first, self.k_scales, self.v_scales)

    def expected(self) -> torch.Tensor:
        return ops.attention(
            self.q,
            *self.view.numbers(),
            start=self.start,
            first=self.first,
            window=self.window or None,
            sink=self.sink,
        )

    def rows(self, a: int, b: int) -> Case:
        """The step that has only rows a .. b of this one."""
        return replace(self.keys(0, len(self.k) - len(self.q) + b), q=self.q[a:b])

    def keys(self, a: int, b: int) -> Case:
        """With rows a .. b of keys and values only."""
        parts = {name: getattr(self, name) for name in ("k", "v", "k_scales", "v_scales")}
        parts = {name: part if part is None else part[a:b] for name, part in parts.items()}
        return replace(self, first=self.first + a, **parts)

    def with_nan(self, key: int) -> Case:
        """The value of one position is no number."""
        name = "v" if self.v_scales is None else "v_scales"
        broken = getattr(self, name).clone()
        broken[key] = torch.nan
        return replace(self, **{name: broken})


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make(
    T: int = 1,
    S: int = 1,
    shared: int = 1,
    G: int = 1,
    dk: int = 16,
    dv: int = 16,
    *,
    first: int = 0,
    window: int = 0,
    sink: bool = False,
    kind: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
) -> Case:
    q = random(T, shared * G, dk, seed=seed, scale=scale)
    k, v = random(S, G, dk, seed=seed + 1, scale=scale), random(S, G, dv, seed=seed + 2)
    sinks = random(shared * G, seed=seed + 3, scale=3.0) if sink else None
    if kind != torch.int8:
        return Case(q, k.to(kind), v.to(kind), first, window, sinks)
    (k, k_scales), (v, v_scales) = coded(k), coded(v)
    return Case(q, k, v, first, window, sinks, k_scales, v_scales)


def attend(k: kernels.Kernels, *cases: Case, extra: int = 3) -> list[torch.Tensor]:
    """All sequences in one call, rows `extra` floats apart, which must stay as they were."""
    c = cases[0]
    heads, dk = c.q.shape[1:]
    groups, dv = c.v.shape[1:]
    facts = kernels.Heads(
        heads,
        groups,
        dk,
        dv,
        c.window,
        None if c.sink is None else c.sink.data_ptr(),
        KV_DTYPES[c.k.dtype],
    )
    sequences = (kernels.Sequence * len(cases))(
        *(kernels.Sequence(*x.view.where, x.first, x.start, len(x.q)) for x in cases)
    )
    rows = sum(len(x.q) for x in cases)
    q = torch.full((rows, heads * dk + extra), float("nan"))
    q[:, : heads * dk] = torch.cat([x.q for x in cases]).flatten(1)
    out = torch.full((rows, heads * dv + extra), float("nan"))
    k.call(
        "attend",
        ctypes.byref(facts),
        q.data_ptr(),
        q.stride(0),
        sequences,
        len(cases),
        out.data_ptr(),
        out.stride(0),
    )
    assert out[:, heads * dv :].isnan().all()
    return list(out[:, : heads * dv].split([len(x.q) for x in cases]))


def close(got: torch.Tensor, case: Case) -> None:
    """Codes of 16 bits are off by 1/65534 of the largest: of a query's dims, of a step's shares."""
    expected = case.expected()
    scale = expected.abs().max().clamp_min(1e-3)
    bound = 1e-5 if case.k.dtype != torch.int8 else 1e-3
    assert (got - expected).abs().max() <= bound * scale


@st.composite
def cases(draw: st.DrawFn, most_rows: int = 40) -> Case:
    T = draw(st.integers(1, most_rows))
    S = T + draw(st.sampled_from([0, 1, 7, 15, 16, 255, 300, 700]))
    return make(
        T,
        S,
        draw(st.sampled_from([1, 2, 3, 5, 7, 8, 16])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 24, 64, 192])),
        draw(st.sampled_from([1, 5, 16, 17, 64, 128])),
        first=draw(st.sampled_from([0, 1, 13, 16, 250, 1000])),
        window=draw(st.sampled_from([0, 0, 1, 2, 5, 16, 128, 400, 2000])),
        sink=draw(st.booleans()),
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
    )


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_attention_is_the_references_and_the_same_on_every_table(
    library: kernels.Kernels, case: Case
) -> None:
    got = attend(library, case)[0]
    close(got, case)
    for isa in library.isas:
        assert torch.equal(attend(library.with_isa(isa), case)[0], got), isa


@settings(max_examples=60, deadline=None)
@given(case=cases(EXACT_ROWS), data=st.data())
def test_a_row_is_the_same_alone_and_in_company(
    library: kernels.Kernels, case: Case, data: st.DataObject
) -> None:
    together = attend(library, case)[0]
    t = data.draw(st.integers(0, len(case.q) - 1))
    assert torch.equal(attend(library, case.rows(t, t + 1))[0], together[t : t + 1])
    assert torch.equal(attend(library, case.rows(0, t + 1))[0], together[: t + 1])


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_a_row_does_not_meet_what_its_neighbours_see(
    library: kernels.Kernels, kind: torch.dtype
) -> None:
    """Not even the NaN of a later key or of one that has left its window."""
    for T, window in ((2, 0), (8, 0), (8, 3), (8, 40), (70, 0), (70, 33)):
        case = make(T, T + 300, 3, 2, window=window, seed=T, kind=kind)
        clean = attend(library, case)[0]
        for key in {0, 299, 300, T + 299}:
            got = attend(library, case.with_nan(key))[0]
            position = torch.arange(300, T + 300)
            sees = (position >= key) & ((position - key < window) if window else True)
            assert got[sees].isnan().all()
            assert torch.equal(got[~sees], clean[~sees])


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 600)), min_size=1, max_size=4),
    window=st.sampled_from([0, 5, 128]),
    seed=st.integers(0, 99),
)
def test_sequences_do_not_meet(
    library: kernels.Kernels, lengths: list[tuple[int, int]], window: int, seed: int
) -> None:
    sequences = [
        make(T, T + old, 4, 2, 24, 20, window=window, seed=seed + 10 * i, first=3 * i)
        for i, (T, old) in enumerate(lengths)
    ]
    sink = random(8, seed=seed)
    sequences = [replace(s, sink=sink) for s in sequences]
    for case, got in zip(sequences, attend(library, *sequences), strict=True):
        assert torch.equal(got, attend(library, case)[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("T", [1, 4, 20, 70])
def test_threads_do_not_matter(library: kernels.Kernels, T: int, kind: torch.dtype) -> None:
    case = make(T, 3000, 16, 4, 48, 32, kind=kind)
    before = library.threads
    results = []
    for threads in (1, 2, 3, 7):
        library.set_threads(threads)
        results.append(attend(library, case)[0])
    library.set_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    close(results[0], case)


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_cache_begins_does_not_matter(
    library: kernels.Kernels, kind: torch.dtype
) -> None:
    """A ring that has dropped rows out of the window gives the bits of one that has not."""
    case = make(3, 900, 4, 2, 32, 32, window=128, kind=kind)
    whole = attend(library, case)[0]
    for gone in (1, 255, 256, 700, 900 - 3 - 127):
        assert torch.equal(attend(library, case.keys(gone, 900))[0], whole)


@pytest.mark.parametrize("T", [1, 8, 70])
def test_a_bad_number_shows_in_all_who_see_it(library: kernels.Kernels, T: int) -> None:
    """In a stored key or in a query: never a plausible result."""
    case = make(T, T + 300, 3, 2, kind=torch.int8, seed=T)
    assert case.k_scales is not None
    scales = case.k_scales.clone()
    scales[299] = torch.nan  # what a key with NaN or infinity is stored with
    assert attend(library, replace(case, k_scales=scales))[0].isnan().all()
    for bad in (torch.nan, torch.inf):
        q = case.q.clone()
        q[0, 0, 3] = bad
        got = attend(library, replace(case, q=q))[0].view(T, 6, 16)
        assert got[0, 0].isnan().all() and got[0, 1:].isfinite().all()
        assert got[1:].isfinite().all()


@pytest.mark.parametrize("size", [1e-38, 1e-31, 1e-20, 1e15])
def test_values_of_any_size_keep_their_proportions(library: kernels.Kernels, size: float) -> None:
    """Below 1e-30 they are zero."""
    case = make(3, 500, 2, 2, kind=torch.int8)
    assert case.v_scales is not None
    plain = attend(library, case)[0]
    got = attend(library, replace(case, v_scales=case.v_scales * size))[0]
    if size > 1e-25:
        torch.testing.assert_close(got / size, plain, rtol=1e-5, atol=1e-6)
    else:
        assert got.abs().max() <= 1e-28


def test_a_flat_context_loses_nothing_to_rounded_shares(library: kernels.Kernels) -> None:
    """One key far above 4000 others: each is 1e-5 of it, all together a third of the result."""
    case = make(1, 4001, 1, 1, 64, 64, kind=torch.int8, seed=4)
    assert case.k_scales is not None
    k, scales = torch.zeros_like(case.k), torch.ones_like(case.k_scales) / 127
    k[7, 0, 0] = 127
    q = torch.zeros_like(case.q)
    q[..., 0] = 8 * 9.0  # a score of 9 beside zeros
    one = replace(case, q=q, k=k, k_scales=scales)
    got, expected = attend(library, one)[0], one.expected()
    assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("scale", [1e4, 1e9, 1e18])
@pytest.mark.parametrize("T", [1, 5, 30])
def test_large_scores(library: kernels.Kernels, T: int, scale: float) -> None:
    """Nothing overflows: the largest score takes all."""
    case = make(T, 600, 3, 2, 16, 16, sink=True)
    case = replace(case, q=case.q * scale)
    got = attend(library, case)[0]
    assert got.isfinite().all()
    exact = [x.double() for x in (case.q, case.k, case.v)]
    assert case.sink is not None
    reference = Case(*exact, 0, 0, case.sink.double())  # type: ignore[arg-type]
    # float32 rounds scores of this size by more than 1, so only rows with a clear winner can agree.
    scores = torch.einsum("thd,sgd->thsg", exact[0], exact[1]) / 4
    own = torch.stack([scores[:, h, :, h // 3] for h in range(6)], 1)
    own.masked_fill_(torch.arange(600) > torch.arange(600 - T, 600)[:, None, None], -torch.inf)
    best = own.topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > 1e-5 * best[..., 0].abs() + 40
    assert clear.float().mean() > 0.3
    del reference
    index = own.argmax(-1)
    won = torch.stack([case.v[index[:, h], h // 3] for h in range(6)], 1)
    positive = clear & (best[..., 0] > 100)
    assert torch.allclose(got.view(T, 6, 16)[positive], won[positive], atol=1e-5)
    negative = best[..., 0] < -200  # the sink takes all
    assert (got.view(T, 6, 16)[negative] == 0).all()


def test_one_key_and_the_sinks_share(library: kernels.Kernels) -> None:
    """With one key the output is its value times sigmoid(score - sink)."""
    case = make(1, 1, 2, 2, 8, 8, sink=True)
    out = attend(library, case)[0].view(4, 8)
    assert case.sink is not None
    score = (case.q[0] * case.k[0].repeat_interleave(2, 0)).sum(-1) / 8**0.5
    share = torch.sigmoid(score - case.sink)[:, None]
    assert torch.allclose(out, share * case.v[0].repeat_interleave(2, 0), rtol=1e-6)
    for sink, factor in ((-torch.inf, 1.0), (1e30, 0.0)):
        far = replace(case, sink=torch.full((4,), sink))
        got = attend(library, far)[0].view(4, 8)
        assert torch.equal(got, factor * case.v[0].repeat_interleave(2, 0))


def test_a_sink_scales_what_there_is_without_it(library: kernels.Kernels) -> None:
    """out with sink s = out without * sigmoid(log sum exp - s)."""
    case = make(2, 700, 2, 2, 16, 16, sink=True, seed=9)
    plain = attend(library, replace(case, sink=None))[0].view(2, 4, 16)
    got = attend(library, case)[0].view(2, 4, 16)
    keys = case.k.repeat_interleave(2, 1)
    scores = torch.einsum("thd,shd->ths", case.q.double(), keys.double()) / 4
    scores[0, :, 699] = -torch.inf
    assert case.sink is not None
    share = torch.sigmoid(scores.logsumexp(-1) - case.sink)
    assert torch.allclose(got, (plain.double() * share[..., None]).float(), rtol=1e-5, atol=1e-7)


def test_no_rows_no_sequences(library: kernels.Kernels) -> None:
    case = make(1, 5)
    assert len(attend(library, replace(case, q=case.q[:0]))[0]) == 0
    mixed = attend(library, case, replace(case, q=case.q[:0]), case)
    assert torch.equal(mixed[0], mixed[2])
    library.call("attend", ctypes.byref(kernels.Heads(2, 1, 4, 4, 0, None, 0)), 0, 8, None, 0, 0, 8)


GOOD = {"heads": 4, "kv_heads": 2, "dk": 8, "dv": 8, "window": 0, "sink": None, "kv_type": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3},
        {"heads": 0},
        {"kv_heads": 0},
        {"kv_heads": -2},
        {"dk": 0},
        {"dv": -1},
        {"dk": 1 << 62},
        {"window": -1},
        {"sink": 2},
        {"first": 5},
        {"first": -1},
        {"T": -1},
        {"start": (1 << 63) - 1},
        {"k": None},
        {"v": 1},
        {"kv_type": 3},
        {"kv_type": -1},
        {"kv_type": 2, "k_scales": None},
        {"kv_type": 2, "v_scales": 2},
        {"ldq": 31},
        {"ldo": 31},
        {"q": 0},
        {"q": 2},
        {"out": 0},
    ],
)
def test_wrong_arguments_are_refused(library: kernels.Kernels, wrong: dict[str, int]) -> None:
    memory = torch.zeros(1 << 10)
    address = memory.data_ptr()
    facts = {**GOOD, **{k: v for k, v in wrong.items() if k in GOOD}}
    kv = {"k": address, "v": address, "first": 0, "start": 4, "T": 1}
    kv |= {"k_scales": address, "v_scales": address}
    kv |= {k: v for k, v in wrong.items() if k in kv}
    call = {"q": address, "ldq": 32, "out": address + 2048, "ldo": 32}
    call |= {k: v for k, v in wrong.items() if k in call}
    heads, sequence = kernels.Heads(**facts), kernels.Sequence(**kv)

    def run() -> None:
        library.call(
            "attend",
            ctypes.byref(heads),
            call["q"],
            call["ldq"],
            ctypes.byref(sequence),
            1,
            call["out"],
            call["ldo"],
        )

    with pytest.raises(NativeError):
        run()


@settings(max_examples=30, deadline=None)
@given(
    T=st.sampled_from([1, 2, 9, 70]),
    D=st.sampled_from([1, 15, 16, 63, 64, 65, 576, 4096]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    extra=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_rms_norm_is_torchs(
    library: kernels.Kernels, T: int, D: int, scale: float, extra: int, seed: int
) -> None:
    x = random(T, D + extra, seed=seed, scale=scale)
    weight = random(D, seed=seed + 1)
    expected = ops.rms_norm(x[:, :D], weight, 1e-5)
    results = []
    for isa in library.isas:
        y = torch.full((T, D + 1), float("nan"))
        k = library.with_isa(isa)
        k.call(
            "rms_norm",
            x.data_ptr(),
            D + extra,
            T,
            D,
            weight.data_ptr(),
            1e-5,
            y.data_ptr(),
            D + 1,
        )
        assert y[:, D].isnan().all()
        results.append(y[:, :D])
    assert torch.allclose(results[0], expected, rtol=2e-6, atol=0)
    assert all(torch.equal(result, results[0]) for result in results)
    k.call(
        "rms_norm", x.data_ptr(), D + extra, T, D, weight.data_ptr(), 1e-5, x.data_ptr(), D + extra
    )
    assert torch.equal(x[:, :D], results[0])
