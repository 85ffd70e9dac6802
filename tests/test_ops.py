"""Each operation against its definition in float64, written the slow way."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import ops
from mimo_local.config import ModelConfig

CONFIG = ModelConfig.from_dict(tiny.config())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, first: int,
    window: int | None, sink: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    n, heads, dk = q.shape
    out = torch.zeros(n, heads, v.shape[2], dtype=torch.float64)
    for t in range(n):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            seen = [
                s
                for s in range(k.shape[0])
                if first + s <= start + t and (window is None or start + t - first - s < window)
            ]
            terms = [math.exp(float(q[t, h].double() @ k[s, g].double()) / dk**0.5) for s in seen]
            total = sum(terms) + (math.exp(float(sink[h])) if sink is not None else 0.0)
            for s, term in zip(seen, terms, strict=True):
                out[t, h] += term / total * v[s, g].double()
    return out.flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 24),
    before=st.integers(0, 20),
    dropped=st.integers(0, 10),
    window=st.one_of(st.none(), st.integers(1, 30)),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    has_sink=st.booleans(),
)
def test_attention_is_its_definition(
    n: int, before: int, dropped: int, window: int | None, groups: int, shared: int, has_sink: bool
) -> None:
    heads = groups * shared
    first = 0 if window is None else min(dropped, max(0, before - window + 1))
    q, k = random(n, heads, 6), random(before + n - first, groups, 6, seed=1)
    v = random(before + n - first, groups, 5, seed=2)
    sink = random(heads, seed=3) if has_sink else None
    found = ops.attention(q, k, v, start=before, first=first, window=window, sink=sink)
    wanted = slow_attention(q, k, v, before, first, window, sink)
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 7, 300])
def test_long_prompts_go_in_blocks_with_the_same_result(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = random(200, 4, 8), random(230, 2, 8, seed=1), random(230, 2, 8, seed=2)
    args = {"start": 30, "first": 0, "window": window, "sink": random(4, seed=3)}
    whole = ops.attention(q, k, v, **args)
    biggest = [0]
    bmm = torch.bmm

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = bmm(a, b)
        biggest[0] = max(biggest[0], out.numel())
        return out

    monkeypatch.setattr(ops, "_SCORES", 4 * 230 * 20)
    monkeypatch.setattr(torch, "bmm", spy)
    torch.testing.assert_close(ops.attention(q, k, v, **args), whole)
    assert biggest[0] <= 4 * 230 * 20


def test_sliding_layers_never_touch_keys_outside_the_window() -> None:
    q, k, v = random(100, 2, 8), random(120, 1, 8), random(120, 1, 8)
    k[:15], v[:15] = math.nan, math.nan
    out = ops.attention(q, k, v, start=20, first=0, window=6, sink=None)
    assert out.isfinite().all()


def test_extreme_sinks_neither_overflow_nor_vanish() -> None:
    q, k, v = random(3, 2, 8), random(3, 1, 8), random(3, 1, 8)
    plain = ops.attention(q, k, v, start=0, first=0, window=4, sink=None)
    low = ops.attention(q, k, v, start=0, first=0, window=4, sink=torch.full((2,), -1e4))
    high = ops.attention(q, k, v, start=0, first=0, window=4, sink=torch.full((2,), 1e4))
    assert torch.equal(low, plain) and torch.equal(high, torch.zeros_like(high))


def test_keys_in_bf16_are_read_as_the_numbers_they_are() -> None:
    q, k, v = random(20, 4, 8), random(20, 2, 8).bfloat16(), random(20, 2, 8).bfloat16()
    args = {"start": 0, "first": 0, "window": None, "sink": None}
    assert torch.equal(
        ops.attention(q, k, v, **args), ops.attention(q, k.float(), v.float(), **args)
    )


@pytest.mark.parametrize("n", [1, 5])
def test_rms_norm_is_its_definition(n: int) -> None:
    x, w = random(n, 33) * 5, random(33, seed=1)
    d = x.double()
    wanted = d / (d.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w.double()
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-3).double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rotary", [2, 6, 10])
def test_rotation_turns_pairs_half_a_head_apart(rotary: int) -> None:
    theta, x = 50.0, random(4, 3, 10)
    cos, sin = ops.RopeTable(theta, rotary).rows([(7, 4)])
    turned = x.clone()
    ops.rotate_(turned, cos, sin)
    half = rotary // 2
    for t in range(4):
        for i in range(half):
            angle = (7 + t) * theta ** (-2 * i / rotary)
            a, b = x[t, :, i].double(), x[t, :, i + half].double()
            c, s = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(turned[t, :, i].double(), a * c - b * s, atol=2e-6, rtol=0)
            torch.testing.assert_close(
                turned[t, :, i + half].double(), b * c + a * s, atol=2e-6, rtol=0
            )
    assert torch.equal(turned[..., rotary:], x[..., rotary:])


def test_rope_tables_grow_without_changing_and_serve_several_sequences() -> None:
    table = ops.RopeTable(1e4, 8)
    early = table.rows([(3, 4)])[0].clone()
    cos, sin = table.rows([(3, 4), (5000, 1), (0, 2)])
    assert torch.equal(cos[:4], early) and cos.shape == sin.shape == (7, 1, 8)
    assert torch.equal(cos[4:5], ops.RopeTable(1e4, 8).rows([(5000, 1)])[0])
    assert torch.equal(cos[5:], torch.cat((torch.ones(1, 1, 8), table.rows([(1, 1)])[0])))


def test_the_bias_chooses_and_does_not_count() -> None:
    x, router = random(6, 32), random(8, 32, seed=1)
    bias = torch.zeros(8)
    bias[5] = 10.0
    ids, w = ops.route(x, router, bias, dataclasses.replace(CONFIG, norm_topk_prob=False))
    assert (ids == 5).any(1).all()
    scores = (x @ router.T).sigmoid()
    torch.testing.assert_close(w, scores.gather(1, ids))


def test_chosen_weights_sum_to_the_scaling_factor() -> None:
    config = dataclasses.replace(CONFIG, experts_per_token=3, routed_scaling_factor=2.5)
    ids, w = ops.route(random(9, 32), random(8, 32, seed=1), torch.zeros(8), config)
    torch.testing.assert_close(w.sum(1), torch.full((9,), 2.5))
    assert all(len(set(row)) == 3 for row in ids.tolist())


def test_grouped_routing_takes_the_groups_with_the_two_best() -> None:
    config = dataclasses.replace(CONFIG, n_group=4, topk_group=2, experts_per_token=3)
    x, router, bias = random(30, 32), random(8, 32, seed=1), random(8, seed=2) * 0.2
    ids, _ = ops.route(x, router, bias, config)
    election = (x @ router.T).sigmoid() + bias
    for row, chosen in zip(election.tolist(), ids.tolist(), strict=True):
        strength = [row[2 * g] + row[2 * g + 1] for g in range(4)]
        best = sorted(range(4), key=strength.__getitem__)[-2:]
        allowed = [e for g in best for e in (2 * g, 2 * g + 1)]
        assert set(chosen) == set(sorted(allowed, key=row.__getitem__)[-3:])


def test_few_rows_route_with_the_bits_of_one_row() -> None:
    x, router, bias = random(8, 32), random(8, 32, seed=1), random(8, seed=2)
    ids, w = ops.route(x, router, bias, CONFIG)
    for t in range(8):
        one_ids, one_w = ops.route(x[t : t + 1], router, bias, CONFIG)
        assert torch.equal(one_ids[0], ids[t]) and torch.equal(one_w[0], w[t])
