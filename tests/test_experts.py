"""The expert store against a loop over rows; what it reads, and when it refuses to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels
from mimo_local.errors import CancelledError, NotEnoughMemoryError
from mimo_local.events import Progress
from mimo_local.experts import memory as module
from mimo_local.experts.store import ExpertStore
from mimo_local.weights import CheckpointWeights, QuantLinear, open_weights
from quant.convert import Recipe, convert

D: dict[str, Any] = tiny.config("fs", "dm", experts=6, top_k=3, hidden=64, moe_intermediate=64)
FORMATS = ["int8", "nf4", "bf16"]
needs_kernels = pytest.mark.skipif(
    kernels.get() is None, reason="torch's products depend on the number of rows"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("experts") / "m", D)


@pytest.fixture(scope="module")
def store(folder: Path) -> ExpertStore:
    return ExpertStore(open_weights(folder))


def choices(t: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(t)])
    return torch.randn(t, 64, generator=g), ids, torch.rand(t, 3, generator=g)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_run_is_the_weighted_sum_over_the_chosen(store: ExpertStore, t: int, seed: int) -> None:
    state = tiny.state_dict(D)
    x, ids, w = choices(t, seed)
    wanted = torch.zeros(t, 64)
    for row in range(t):
        for k in range(3):
            prefix = f"model.layers.1.mlp.experts.{int(ids[row, k])}."
            gate, up, down = (state[f"{prefix}{p}_proj.weight"] for p in ("gate", "up", "down"))
            wanted[row] += w[row, k] * (down @ (F.silu(gate @ x[row]) * (up @ x[row])))
    torch.testing.assert_close(store.run(1, x, ids, w), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("pairs", [1, 60, 512])
@pytest.mark.parametrize("way", ["native", "torch"])
def test_a_sweep_has_the_bits_of_a_run_and_can_be_stopped_between_experts(
    store: ExpertStore, pairs: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr("mimo_local.experts.store.BATCH_PAIRS", pairs)
    x, ids, w = choices(40, 4)
    ids[:, 1][torch.arange(40) % 3 == 1] = -1
    ids[ids == 2] = -1
    wanted, asked, seen = store.run(1, x, ids, w), [], []
    store.watch(lambda layer, chosen: seen.append(layer))
    try:
        assert torch.equal(store.sweep(1, x, ids, w, cancel=lambda: bool(asked.append(1))), wanted)
    finally:
        store.watch(None)
    assert seen == [1] and len(asked) == {1: 5, 60: 2, 512: 1}[pairs]
    with pytest.raises(CancelledError):
        store.sweep(1, x, ids, w, cancel=lambda: True)
    nobody = torch.full_like(ids, -1)
    assert not store.sweep(1, x, nobody, w).any()


@pytest.mark.parametrize("t", [1, 2, 16, 100])
def test_the_twin_reads_each_experts_bytes_once_per_step(
    store: ExpertStore, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids, w = choices(t, 7)
    read: list[int] = []
    plain = QuantLinear.__call__

    def spy(self: QuantLinear, rows: torch.Tensor) -> torch.Tensor:
        read.append(id(self))
        return plain(self, rows)

    monkeypatch.setattr(QuantLinear, "__call__", spy)
    store.run_torch(1, x, ids, w)
    assert len(read) == len(set(read)) == 3 * len(set(ids.flatten().tolist()))


def test_without_the_kernels_the_twin_runs(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids, w = choices(5, 2)
    monkeypatch.setattr(kernels, "get", lambda: None)
    assert torch.equal(store.run(1, x, ids, w), store.run_torch(1, x, ids, w))


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStore]:
    """The same experts by format."""
    where = tmp_path_factory.mktemp("packs")
    for fmt in FORMATS:
        convert(folder, where / fmt, Recipe.for_format(fmt))
    return {fmt: ExpertStore(open_weights(where / fmt)) for fmt in FORMATS}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(0, 1000))
def test_run_equals_its_twin_but_for_the_rounding_of_activations(
    packed: dict[str, ExpertStore], fmt: str, t: int, seed: int
) -> None:
    """8 bits per 64 columns are 0.6 % of a product with normal x, and there are three in a row."""
    x, ids, w = choices(t, seed)
    ids[:, 0][torch.arange(t) % 3 == 1] = -1
    wanted = packed[fmt].run_torch(1, x, ids, w)
    bound = 1e-5 if fmt == "bf16" else 3e-2
    assert (packed[fmt].run(1, x, ids, w) - wanted).norm() <= bound * wanted.norm()


@needs_kernels
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_rows_bits_do_not_depend_on_its_company(packed: dict[str, ExpertStore], fmt: str) -> None:
    x, ids, w = choices(8, 3)
    together = packed[fmt].run(1, x, ids, w)
    for row in range(8):
        one = slice(row, row + 1)
        assert torch.equal(packed[fmt].run(1, x[one], ids[one], w[one]), together[one])
    some = torch.tensor([7, 2, 5])
    assert torch.equal(packed[fmt].run(1, x[some], ids[some], w[some]), together[some])


def test_the_kernels_are_given_the_bytes_as_they_were_read(packed: dict[str, ExpertStore]) -> None:
    for fmt, store in packed.items():
        mlps, alive = store.mlps(1)
        held = store.ram.get(1)
        assert len(mlps) == len(held) == 6 and alive is store.ram
        for mlp, expert in zip(mlps, held, strict=True):
            assert mlp.gate.codes % 4096 == 0
            blocks = {
                linear.parts[n].untyped_storage().data_ptr()
                for linear in (expert.gate, expert.up, expert.down)
                for n in linear.parts
            }
            assert len(blocks) == 1
            for name in ("gate", "up", "down"):
                matrix, linear = getattr(mlp, name), getattr(expert, name)
                part = linear.parts["weight" if fmt == "bf16" else "codes"]
                assert (matrix.codes, matrix.rows) == (part.data_ptr(), linear.rows)


def test_the_order_of_the_chosen_changes_no_bit(store: ExpertStore) -> None:
    x, ids, w = choices(1, 5)
    turned = torch.tensor([2, 0, 1])
    assert torch.equal(store.run(1, x, ids, w), store.run(1, x, ids[:, turned], w[:, turned]))


def test_loading_reports_every_layer_and_holds_what_it_says(folder: Path) -> None:
    seen: list[Progress] = []
    weights = open_weights(folder)
    store = ExpertStore(weights, on_progress=seen.append)
    assert [(p.done, p.total) for p in seen] == [(weights.expert_nbytes, weights.expert_nbytes)]
    assert store.nbytes == {"ram": 6 * 3 * 64 * 64 * 4}


def test_a_model_without_experts_needs_no_store(tmp_path: Path) -> None:
    weights = open_weights(tiny.write(tmp_path / "m", tiny.config("fs", "dd")))
    assert ExpertStore(weights).nbytes == {"ram": 0}


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("bytes were read")

    monkeypatch.setattr(module, "available_memory", lambda: 2_000_000_000)
    monkeypatch.setattr(CheckpointWeights, "nbytes", 161_500_000_000)
    monkeypatch.setattr(CheckpointWeights, "expert", never)
    message = r"takes 161\.5 GB .* 2\.0 GB are free: 159\.5 GB are missing"
    with pytest.raises(NotEnoughMemoryError, match=message) as e:
        ExpertStore(open_weights(folder))
    assert "mimo plan" in e.value.hint


def test_a_cgroup_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimo_local.hardware.cgroup_memory", lambda: (1 << 30, 12345))
    assert module.available_memory() == 12345
