"""The VRAM tier on the CPU as its device: the same lines as on an accelerator, real numbers.

tests/test_sim_device.py runs the tier on a stand-in accelerator that catches missing waits.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import kernels
from mimo_local.errors import UsageError
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


@pytest.fixture(scope="module", params=["nf4", "int8"])
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


def store(pack: Path, vram: int, ram: int = 8) -> TieredStore:
    slot = opened(pack).pack.expert_layout(1).stride
    return TieredStore(
        opened(pack), (ram + 2 * K) * slot, reserve=0, prefetch="off", vram=tier(pack, vram)
    )


def step(t: int, seed: int, among: int = EXPERTS) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(among, generator=g)[:K].sort()[0] for _ in range(t)]).int()
    return torch.randn(t, D, generator=g), ids, torch.rand(t, K, generator=g)


@pytest.mark.parametrize("vram", [0, 1, 5, 32])
def test_results_are_those_of_the_cpu_to_the_rounding(pack: Path, vram: int) -> None:
    whole, tiers, chance = ExpertStore(opened(pack)), store(pack, vram), random.Random(1)
    for seed in range(80):
        layer, t = chance.choice((1, 2)), chance.choice([1, 1, 1, 2, 8, 30, 100])
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
        y = torch.zeros(3, D)
        vram.launch(1, x, {e: [0, 2]}).collect(y)
        wanted = apply(whole.ram.get(1)[e], x[[0, 2]])
        torch.testing.assert_close(y[[0, 2]], wanted, atol=1e-5, rtol=1e-4)
        assert not y[1].any()


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


def test_formats_no_device_multiplies_are_refused(tmp_path: Path) -> None:
    pack = make(tmp_path, "mxfp4")
    with pytest.raises(UsageError, match="mxfp4") as caught:
        tier(pack, 4)
    assert "--vram 0" in caught.value.hint
