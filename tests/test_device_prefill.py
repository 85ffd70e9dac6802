"""Long prompts by the accelerator's way, the CPU as that device: the numbers of the host's way.

Float32 on both sides and no kernels, so that nothing but the order of sums differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import kernels
from mimo_local.cache import KVCache
from mimo_local.device import Devices
from mimo_local.errors import CancelledError
from mimo_local.events import Progress
from mimo_local.experts import device_sweep
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.shares import Costs, Rates
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.tiered import TieredStore
from mimo_local.experts.vram import VramTier
from mimo_local.model import Model, Segment
from mimo_local.prefill import LEAST_ROWS, How, Room
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

CPU, THERE = torch.device("cpu"), torch.device("cpu", 0)
CONFIG: dict[str, Any] = tiny.config("fsfs", "dmmm", experts=16, top_k=4, hidden=64)
CLOSE = 2e-5
COSTS = Costs(1e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0)
"""Each side gets half of the experts."""
PLACES = [(1, 1, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 0, 1), (1, 1, 1, 0)]


class Mixed(Devices):
    """Layers on cpu:0 take the accelerator's way; the others are on the host."""

    def of(self, device: torch.device) -> torch.device | None:
        return device if device.index is not None else None


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefill")
    convert(
        tiny.write(folder / "m", CONFIG), folder / "pack", Recipe.for_format(str(request.param))
    )
    return folder / "pack"


@pytest.fixture(autouse=True)
def _plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr(Rates, "observe", lambda *_: None)  # who gets what is fixed here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_host(pack: Path) -> Model:
    weights = open_weights(pack)
    return Model(weights, ExpertStore(weights))


@pytest.fixture
def placed(pack: Path) -> Iterator[Callable[..., Model]]:
    """Makes models with some layers on the device."""
    stores: list[Store] = []

    def make(on: tuple[int, ...] = (1, 1, 1, 1), *, disk: bool = True) -> Model:
        weights = open_weights(pack)
        assert isinstance(weights, PackWeights)
        layouts = {n: weights.pack.expert_layout(n) for n in weights.pack.expert_layers}
        inner: Store = ExpertStore(weights)
        if disk:
            inner = TieredStore(weights, 20 * layouts[1].stride, reserve=0, prefetch="off")
        tier = VramTier(layouts, 6 * VramTier(layouts, 0, THERE).slot_bytes, THERE)
        prompts = DeviceSweep.of(inner, tier, THERE, weights)
        prompts.rates.guess = COSTS
        stores.append(DeviceStore(inner, tier, THERE, list(layouts), prompts))
        where = tuple(THERE if there else CPU for there in on)
        return Model(weights, stores[-1], devices=Mixed(where, where[-1], CPU))

    yield make
    for store in stores:
        store.close()


def ids(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG["vocab_size"], (n,), generator=generator)


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def after(model: Model, cache: KVCache) -> torch.Tensor:
    """Logits of one more token: what it sees of everything in the cache."""
    return model.logits(model.forward([Segment(ids(1, 99), cache)]))


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize("how", [How(), How(chunk=70, device_chunk=110), How(whole=True)])
def test_layers_on_both_sides_read_what_the_host_reads(
    pack: Path, placed: Callable[..., Model], on: tuple[int, ...], how: How
) -> None:
    host, model = on_host(pack), placed(on)
    a, b = host.new_cache(), model.new_cache()
    for n in (400, 300):
        wanted = host.prefill(Segment(ids(n), a), tail=3, how=how)
        assert off(model.prefill(Segment(ids(n), b), tail=3, how=how), wanted) < CLOSE
    assert off(after(model, b), after(host, a)) < CLOSE


@pytest.mark.parametrize("on", PLACES)
def test_more_rows_than_memory_in_parts_and_the_hosts_rows_in_a_file(
    pack: Path, placed: Callable[..., Model], on: tuple[int, ...]
) -> None:
    row = 10 * 64 + 48 * 4
    host, model, n = on_host(pack), placed(on), 2 * LEAST_ROWS + 30
    a, b, seen = host.new_cache(), model.new_cache(), list[Progress]()
    how = How(chunk=90, device_chunk=200, device_budget=(LEAST_ROWS + 20) * row, budget=0)
    wanted = host.prefill(Segment(ids(n), a))
    found = model.prefill(Segment(ids(n), b), how=how, on_progress=seen.append)
    assert off(found, wanted) < CLOSE and off(after(model, b), after(host, a)) < CLOSE
    parts = 3 if not all(on) else 2  # the host has no room at all here
    assert {p.stage for p in seen} == {f"reading the prompt in {parts} parts"}
    assert [p.done for p in seen] == sorted({p.done for p in seen}) and seen[-1].done == n


@pytest.mark.parametrize("on", [(1, 1, 1, 1), (0, 1, 0, 1)])
def test_a_prompt_that_is_stopped_leaves_the_cache_as_it_was(
    placed: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, on: tuple[int, ...]
) -> None:
    monkeypatch.setattr(device_sweep, "ASK_S", 0.0)
    model, asks = placed(on), 0

    def counted() -> bool:
        nonlocal asks
        asks += 1
        return False

    model.prefill(Segment(ids(300), model.new_cache()), cancel=counted)
    wanted = None
    # The host's own sweep asks as often as reads land: not the same number every time.
    for at in range(0, asks // 2 if 0 in on else asks, 5):
        cache, left = model.new_cache(), itertools.count()
        model.forward([Segment(ids(20), cache)])
        with pytest.raises(CancelledError):
            model.prefill(
                Segment(ids(300), cache), cancel=lambda left=left, at=at: next(left) == at
            )
        assert cache.length == 20
        found = after(model, cache)
        wanted = found if wanted is None else wanted
        assert off(found, wanted) < CLOSE  # who computes an expert changes as it comes into VRAM


def test_a_prompt_reads_each_expert_once(placed: Callable[..., Model]) -> None:
    model, seen = placed(), set[tuple[int, int]]()
    store = model.experts
    assert isinstance(store, DeviceStore) and isinstance(store.inner, TieredStore)
    store.watch(lambda layer, ids: seen.update((layer, e) for e in ids.flatten().tolist()))
    model.prefill(Segment(ids(500), model.new_cache()))
    stride = store.inner.disk.layouts[1].stride
    # The last layer's are asked for the last row alone, as in a step.
    swept = {key for key in seen if key[0] < 3}
    assert store.meters.sweep_bytes == len(swept) * stride


def test_the_room_a_device_has() -> None:
    """The real model: 41 KB of it for a row."""
    gb = 1 << 30
    assert Room(1, False).on_device(16_384, 4096, 8, gb) == Room(1, False)
    assert Room(1, True).on_device(60_000, 4096, 8, gb) == Room(3, True)
    assert Room(5, False).on_device(60_000, 4096, 8, gb) == Room(5, False)
    assert Room(1, False).on_device(300, 4096, 8, 0) == Room(2, False)
