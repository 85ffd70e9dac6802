"""A million positions, as V2.5 and V2.6 have: angles as in training, small tables, the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels, ops
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.weights import open_weights

MILLION = 1_048_576


def reference(theta: float, dim: int, positions: torch.Tensor) -> torch.Tensor:
    """cos (n, dim) by the operations of transformers' rotary embedding, in float32."""
    inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    freqs = (inv_freq[:, None].float() @ positions[None].float()).transpose(0, 1)
    return torch.cat((freqs, freqs), -1).cos()


@pytest.mark.parametrize("theta", [1e4, 5e6, 1e7])
def test_far_angles_are_the_float32_products_of_training(theta: float) -> None:
    table = ops.RopeTable(theta, 64)
    for start in (0, 262_143, MILLION - 9):
        cos, _ = table.rows([(start, 9)])
        positions = torch.arange(start, start + 9)
        torch.testing.assert_close(cos[:, 0], reference(theta, 64, positions), rtol=0, atol=2e-7)
    # Exact products would be other angles by then: a hundredth of a turn at the first dims.
    exponents = torch.arange(0, 64, 2).double() / 64
    exact = ((MILLION - 1) * theta**-exponents).cos()
    assert (exact - table.rows([(MILLION - 1, 1)])[0][0, 0, :32]).abs().max() > 1e-3


@given(st.lists(st.tuples(st.integers(0, MILLION), st.integers(1, 9000)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_any_spans_give_the_rows_of_their_positions(spans: list[tuple[int, int]]) -> None:
    table = TABLE
    cos, sin = table.rows(spans)
    assert cos.shape == sin.shape == (sum(n for _, n in spans), 1, 8)
    at = 0
    for start, n in spans:
        for i in {0, n // 2, n - 1}:
            one = table.rows([(start + i, 1)])
            assert torch.equal(cos[at + i], one[0][0]) and torch.equal(sin[at + i], one[1][0])
        at += n


TABLE = ops.RopeTable(1e7, 8)


def test_a_table_of_a_million_positions_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ops.RopeTable(1e7, 64)
    monkeypatch.setattr(ops.RopeTable, "KEPT", 4)
    for i in range(12):
        table.place(MILLION - 3000 * i, 1)
    held = sum(part.nbytes for block in table._blocks.values() for part in block)
    assert held == 4 * 1024 * 64 * 4 * 2 and len(table._where) <= 4


def test_addresses_are_those_of_the_rows() -> None:
    import ctypes

    table = ops.RopeTable(1e7, 8)
    for start, n in ((5, 3), (1020, 12), (MILLION - 1, 4), (5, 3)):
        wanted = table.rows([(start, n)])
        for address, part in zip(table.place(start, n), wanted, strict=True):
            found = torch.frombuffer(
                bytearray(ctypes.string_at(address, 32 * n)), dtype=torch.float32
            )
            assert torch.equal(found, part.flatten())


def test_the_layers_agree_at_the_end_of_a_million_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full and a sliding layer over random keys and values: the kernels against torch."""
    if kernels.get() is None:
        pytest.skip("without the native kernels there is only the torch way")
    d = tiny.config(
        "fs", "dd", heads=2, kv_heads=1, head_dim=8, v_head_dim=8, rotary=0.5, theta=1e7,
        context=MILLION, hidden=16, intermediate=16,
    )  # fmt: skip
    folder = tiny.write(tmp_path / "m", d)
    length, found = MILLION - 20, []
    ids = [tiny.prompt(d, n, seed=n) for n in (1, 3, 16)]
    for native in (True, False):
        if not native:
            monkeypatch.setattr(kernels, "get", lambda: None)
        weights = open_weights(folder)
        model = Model(weights, ExpertStore(weights))
        cache = model.new_cache(dtype=torch.bfloat16)
        full, ring = cache.layers
        g = torch.Generator().manual_seed(0)
        for part in full.blank(0, length).values():
            part.copy_(torch.randn(part.shape, generator=g).bfloat16())
        start = length - 12
        for part in ring.blank(start, 12).values():
            part.copy_(torch.randn(part.shape, generator=g).bfloat16())
        cache.length = length
        hidden = [model.forward([Segment(part, cache)]) for part in ids]
        assert cache.length == MILLION
        found.append(torch.cat(hidden))
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=0.01)
    assert found[0].isfinite().all()
