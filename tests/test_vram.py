"""Experts on a device, the CPU as that device: the same lines as on an accelerator, real numbers.

tests/test_sim_device.py runs them on a stand-in accelerator that catches missing waits,
tests/test_fake_cuda.py under tensors that only have a device and a shape.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import kernels
from mimo_local.experts.device_store import STEP_ROWS, DeviceStore
from mimo_local.experts.slots import SlotLayout
from mimo_local.experts.store import ExpertStore, apply
from mimo_local.experts.tiered import TieredStore
from mimo_local.experts.vram import VramTier
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

EXPERTS, K, D = 16, 4, 64
CONFIG: dict[str, Any] = tiny.config(
    "fsf", "dmm", experts=EXPERTS, top_k=K, hidden=D, moe_intermediate=64
)
BOUND = 4e-2  # the CPU rounds activations to 8 bits, three times in a row; the device does not


def make(folder: Path, fmt: str) -> Path:
    convert(tiny.write(folder / "m", CONFIG), folder / "pack", Recipe.for_format(fmt))
    return folder / "pack"


@pytest.fixture(scope="module", params=["nf4", "int8", "mxfp4"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("vram"), str(request.param))


def opened(pack: Path) -> PackWeights:
    found = open_weights(pack)
    assert isinstance(found, PackWeights)
    return found


def tier(pack: Path, slots: int) -> VramTier:
    layouts = {layer: opened(pack).pack.expert_layout(layer) for layer in (1, 2)}
    one = VramTier(layouts, 0, "cpu").slot_bytes
    return VramTier(layouts, slots * one + one // 2, "cpu")


def store(pack: Path, vram: int, ram: int | None = 8) -> DeviceStore:
    """`ram`: experts that lie there; None: all of them, no disk."""
    slot = opened(pack).pack.expert_layout(1).stride
    inner: ExpertStore | TieredStore = ExpertStore(opened(pack))
    if ram is not None:
        inner = TieredStore(opened(pack), (ram + 2 * K) * slot, reserve=0, prefetch="off")
    return DeviceStore(inner, tier(pack, vram), "cpu", [1, 2])


def step(t: int, seed: int, among: int = EXPERTS) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(among, generator=g)[:K].sort()[0] for _ in range(t)]).int()
    return torch.randn(t, D, generator=g), ids, torch.rand(t, K, generator=g)


@pytest.mark.parametrize(("vram", "ram"), [(0, 8), (1, 8), (5, 8), (32, 8), (5, None)])
def test_results_are_those_of_the_cpu_to_the_rounding(
    pack: Path, vram: int, ram: int | None
) -> None:
    whole, tiers, chance = ExpertStore(opened(pack)), store(pack, vram, ram), random.Random(1)
    for seed in range(60):
        layer, t = chance.choice((1, 2)), chance.choice([1, 1, 1, 2, STEP_ROWS, 30, 100])
        x, ids, w = step(t, seed)
        wanted = whole.run(layer, x, ids, w)
        found = tiers.run(layer, x, ids, w) if t < 50 else tiers.sweep(layer, x, ids, w)
        error = float((found - wanted).norm() / wanted.norm())
        assert error < BOUND
    assert tiers.vram is not None
    assert len(tiers.vram) <= vram
    assert tiers.vram.nbytes == vram * tiers.vram.slot_bytes == tiers.nbytes["vram"]
    assert (tiers.meters.vram_hits > 0) == (vram > 0)
    assert tiers.meters.uploads >= len(tiers.vram)


def test_the_device_computes_with_the_stored_weights(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)  # float32 activations on both sides
    whole, vram = ExpertStore(opened(pack)), tier(pack, EXPERTS)
    x = torch.randn(3, D)
    for e in range(5):
        vram.touch((1, e))
        assert vram.consider((1, e), whole.ram.get(1)[e])
        vram.end_of_step()
        wanted = apply(whole.ram.get(1)[e], x)
        torch.testing.assert_close(vram.run((1, e), x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("t", [1, 3, STEP_ROWS])
def test_both_shares_of_a_step_add_up_exactly(
    pack: Path, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)
    whole, tiers = ExpertStore(opened(pack)), store(pack, 6)
    seen = []
    tiers.watch(lambda layer, ids: seen.append((layer, ids.clone())))
    for seed in range(12):
        x, ids, w = step(t, seed, among=8)
        before = tiers.meters.vram_hits
        found = tiers.run(2, x, ids, w)
        torch.testing.assert_close(found, whole.run(2, x, ids, w), atol=1e-5, rtol=1e-4)
        assert seen[-1][0] == 2 and torch.equal(seen[-1][1], ids)  # experts in VRAM are told too
        tiers.vram.end_of_step()  # type: ignore[union-attr]
    assert tiers.meters.vram_hits > before
    assert len(seen) == 12


def test_what_is_wanted_most_comes_in_slowly_and_stays(pack: Path) -> None:
    tiers = store(pack, 4, ram=32)
    assert tiers.vram is not None
    for seed in range(40):
        before = tiers.meters.uploads
        for layer in (1, 2):
            hot = step(1, seed, among=4 if layer == 1 else EXPERTS)
            tiers.run(layer, *hot)
        assert tiers.meters.uploads - before <= 2  # one per layer and step
    assert {(1, e) for e in range(4)} == set(tiers.vram._slot)
    before = tiers.meters.copy()
    tiers.run(1, *step(1, 99, among=4))
    used = tiers.meters.since(before)
    assert (used.vram_hits, used.ram_hits, used.misses, used.disk_bytes) == (K, 0, 0, 0)


def test_guesses_are_read_but_for_those_in_vram(pack: Path) -> None:
    tiers = store(pack, 4, ram=0)
    assert tiers.vram is not None
    expert = ExpertStore(opened(pack)).ram.get(2)[3]
    tiers.vram.touch((2, 3))
    assert tiers.vram.consider((2, 3), expert)
    tiers.run(1, *step(1, 0), guess=(2, torch.tensor([3, 7])))
    assert tiers.meters.prefetched == 1
    tiers.run(2, torch.randn(1, D), torch.tensor([[0, 3, 7, 9]]).int(), torch.rand(1, K))
    assert (tiers.meters.staged_hits, tiers.meters.vram_hits) == (1, 1)


def test_a_prompt_changes_nothing_in_vram(pack: Path) -> None:
    tiers = store(pack, 4)
    for seed in range(20):
        tiers.run(1, *step(1, seed))
    assert tiers.vram is not None
    held, uploads = set(tiers.vram._slot), tiers.meters.uploads
    for seed in range(5):
        tiers.sweep(1, *step(200, seed))
    assert set(tiers.vram._slot) == held
    assert tiers.meters.uploads == uploads


def test_layers_stored_in_different_ways_share_the_slots(tmp_path: Path) -> None:
    small, large = (opened(make(tmp_path / fmt, fmt)) for fmt in ("nf4", "int8"))
    layouts = {1: small.pack.expert_layout(1), 2: large.pack.expert_layout(2)}
    sizes = [SlotLayout.of(layout, torch.device("cpu")).nbytes for layout in layouts.values()]
    vram = VramTier(layouts, 3 * max(sizes), "cpu")
    assert vram.slot_bytes == max(sizes) > min(sizes)
    x = torch.randn(2, D)
    for layer, weights in ((1, small), (2, large), (1, small), (2, large)):
        expert = weights.expert(layer, layer)
        vram.touch((layer, layer))
        vram.consider((layer, layer), expert)
        wanted = apply(expert, x)
        error = (vram.run((layer, layer), x) - wanted).norm() / wanted.norm()
        assert error < BOUND
        vram.end_of_step()
