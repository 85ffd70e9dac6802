"""Experts across RAM and disk: the bits of the store that holds all, whatever lies where."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import kernels
from mimo_local.errors import CancelledError, NotEnoughMemoryError, PackError
from mimo_local.experts import disk as disk_module
from mimo_local.experts.disk import DiskTier
from mimo_local.experts.opening import open_store
from mimo_local.experts.policy import AgedFrequency, Lru
from mimo_local.experts.prefetch import WINDOW, Trial
from mimo_local.experts.pressure import CALM, INTERVAL, Pressure
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

EXPERTS, K, D = 16, 4, 64
CONFIG: dict[str, Any] = tiny.config(
    "fsfs", "dmmm", experts=EXPERTS, top_k=K, hidden=D, moe_intermediate=64
)
LAYERS = (1, 2, 3)
RING = 2 * K


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiered")
    convert(
        tiny.write(folder / "m", CONFIG), folder / "pack", Recipe.for_format(str(request.param))
    )
    return folder / "pack"


@pytest.fixture(scope="module")
def whole(pack: Path) -> ExpertStore:
    return ExpertStore(open_weights(pack))


def weights(pack: Path) -> PackWeights:
    found = open_weights(pack)
    assert isinstance(found, PackWeights)
    return found


def tiered(pack: Path, slots: int, **kwargs: Any) -> TieredStore:
    """A store that may keep `slots` experts."""
    opened = weights(pack)
    slot = opened.pack.expert_layout(1).stride
    return TieredStore(opened, (slots + RING) * slot, reserve=0, **kwargs)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def step(t: int, seed: int, gap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:K].sort()[0] for _ in range(t)])
    ids[torch.rand(t, K, generator=g) < gap] = -1
    return torch.randn(t, D, generator=g), ids.int(), torch.rand(t, K, generator=g)


@pytest.mark.parametrize("slots", [0, 1, 5, 20, 48])
@pytest.mark.parametrize("prefetch", ["off", "on"])
def test_the_bits_do_not_depend_on_what_lies_where(
    pack: Path, whole: ExpertStore, slots: int, prefetch: str, way: str
) -> None:
    store = tiered(pack, slots, prefetch=prefetch)
    chance = random.Random(slots)
    for seed in range(60):
        layer, t = chance.choice(LAYERS), chance.choice([1, 1, 1, 2, 4, 8, 9, 40, 64, 65, 300])
        x, ids, w = step(t, seed, gap=0.1)
        if store.wants_guesses:  # some right, some wrong
            store.expect(layer, torch.cat([ids[:1, :2], step(1, seed + 1)[1][:, :2]]))
        found = store.run(layer, x, ids, w)
        wanted = whole.run(layer, x, ids, w)
        if way == "native":
            assert torch.equal(found, wanted)
        else:  # torch's sums over several rows choose their own order
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert len(store.ram) <= slots
    assert store.ram.ring_left + len(store._orphans) == RING
    assert (store.meters.prefetched > 0) == (prefetch == "on")
    if slots == 48:
        assert store.meters.misses + store.meters.staged_hits <= 48


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 10_000), st.booleans())
def test_others_may_step_through_the_tiers_in_the_middle_of_a_sweep(
    pack: Path, whole: ExpertStore, slots: int, seed: int, guesses: bool
) -> None:
    """What `scheduler` does: a long prompt is read, and others write between its experts."""
    store, chance = tiered(pack, slots, prefetch="on" if guesses else "off"), random.Random(seed)
    layer, wrong, asked = chance.choice(LAYERS), list[int](), 0

    def between() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            with pytest.raises(PackError):  # a step that fails on its way leaves its guesses
                store.expect(LAYERS[-1], step(1, seed)[1])
                raise PackError("not this time", hint="again")
        for at in LAYERS if chance.random() < 0.6 else ():
            x, ids, w = step(chance.choice([1, 1, 2, 8, 30]), seed + asked + at, gap=0.1)
            if guesses:
                store.expect(at, ids.flip(1))
            if not torch.equal(store.run(at, x, ids, w), whole.run(at, x, ids, w)):
                wrong.append(at)
        return False

    x, ids, w = step(chance.choice([3, 70, 300]), seed)
    found = store.sweep(layer, x, ids, w, cancel=between)
    assert asked
    assert torch.equal(found, whole.sweep(layer, x, ids, w))
    assert not wrong
    assert len(store.ram) <= slots
    store.wait_for_orphans()
    assert store.ram.ring_left + len(store._ahead) == RING
    assert 0 <= store.meters.sweep_bytes <= store.meters.disk_bytes


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 400), st.integers(0, 10_000))
def test_a_sweep_gives_the_same_bits_and_reads_each_expert_once(
    pack: Path, whole: ExpertStore, slots: int, t: int, seed: int
) -> None:
    store = tiered(pack, slots)
    x, ids, w = step(t, seed)
    for _ in range(3):
        before, held = store.disk.bytes_read, set(store.ram)
        found = store.sweep(2, x, ids, w)
        assert torch.equal(found, whole.run(2, x, ids, w)) or kernels.get() is None
        touched = {(2, e) for e in ids.flatten().tolist()}
        stride = store.disk.layouts[2].stride
        assert store.disk.bytes_read - before == len(touched - held) * stride
        assert held <= set(store.ram)  # nothing was pushed out
        assert sum(layer == 2 for layer, _ in store.ram) <= slots // len(LAYERS)
    assert store.meters.sweep_bytes == store.disk.bytes_read


def test_a_sweep_keeps_what_the_prompt_uses_most(pack: Path) -> None:
    store = tiered(pack, 3 * 2)
    ids = torch.tensor([[0, 1, 2, 9], [3, 4, 5, 9], [6, 7, 8, 9], [0, 7, 9, 10]], dtype=torch.int32)
    x, w = torch.randn(4, D), torch.ones(4, K)
    store.sweep(1, x, ids, w)
    assert (1, 9) in store.ram
    assert len(store.ram) == 2


def test_every_layer_has_its_share_even_of_too_little(pack: Path) -> None:
    store = tiered(pack, 3 * 2)  # half of what a layer's step wants
    hits = 0
    for seed in range(30):
        for layer in LAYERS:
            store.run(layer, *step(1, seed % 2))
            assert sum(key[0] == layer for key in store.ram) <= 2
        hits = store.meters.ram_hits
    assert hits > 20


def test_hits_are_computed_while_misses_are_on_their_way(pack: Path) -> None:
    gate, computed = threading.Event(), threading.Event()

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        assert gate.wait(10)
        return os.preadv(fd, views, offset)

    store = tiered(pack, 20)
    x, ids, w = step(1, 1)
    store.run(1, x, ids, w)
    store.disk._preadv = slow
    ids2 = ids.clone()
    ids2[0, -1] = next(e for e in range(EXPERTS) if e not in ids[0])
    native, calls = kernels.get(), list[str]()
    if native is None:
        pytest.skip("no kernels")
    plain = native.call

    def spy(name: str, *args: Any) -> None:
        plain(name, *args)
        calls.append(name)
        if len(calls) == 1:
            computed.set()
            gate.set()

    native.call = spy  # type: ignore[method-assign]
    try:
        store.run(1, x, ids2.sort()[0], w)
    finally:
        del native.call  # type: ignore[method-assign]
    assert computed.is_set()
    assert calls == ["moe", "moe", "combine"]


def test_lru_keeps_what_was_wanted_last(pack: Path) -> None:
    store = tiered(pack, K, policy=Lru)
    for seed in (1, 2):
        x, ids, w = step(1, seed)
        store.run(1, x, ids, w)
        assert {e for _, e in store.ram} == set(ids.flatten().tolist())
    before = store.meters.copy()
    store.run(1, x, ids, w)
    assert store.meters.since(before).ram_hits == K
    assert store.meters.since(before).disk_bytes == 0


@pytest.mark.parametrize("policy", [Lru, AgedFrequency])
def test_ten_thousand_evictions_leave_no_trace(pack: Path, policy: Any) -> None:
    store = tiered(pack, 2 * K, policy=policy)
    fds, rss = open_files(), 0
    seed = 0
    while store.meters.evictions < 10_000:
        x, ids, w = step(8, seed)
        store.run(LAYERS[seed % 3], x, ids, w)
        seed += 1
        if seed == 200:
            rss = psutil.Process().memory_info().rss
            fds = open_files()
    assert store.ram.ring_left == RING
    assert len(store.ram) + len(store.ram._free) == 2 * K
    assert psutil.Process().memory_info().rss - rss < 8 << 20
    assert open_files() == fds


# ---- faults --------------------------------------------------------------------------------------


class Faulty:
    """A disk that does as told: fails, reads short, or hands out other bytes."""

    def __init__(self, plan: Callable[[int], str]) -> None:
        self.plan, self.calls, self.lock = plan, 0, threading.Lock()

    def __call__(self, fd: int, views: list[memoryview], offset: int) -> int:
        with self.lock:
            self.calls += 1
            what = self.plan(self.calls)
        if what == "error":
            raise OSError(errno.EIO, "Input/output error")
        if what == "end":
            return 0
        if what == "short":
            half = max(4096, len(views[0]) // 2 // 4096 * 4096)
            return os.preadv(fd, [views[0][:half]], offset)
        n = os.preadv(fd, views, offset)
        if what == "flip":
            views[0][n // 2] ^= 1
        return n


@pytest.mark.parametrize(("fault", "says"), [("error", "Input/output"), ("end", "ends inside")])
@pytest.mark.parametrize("t", [1, 8, 40, 200])
def test_a_fault_is_an_error_that_names_the_file_and_the_store_goes_on(
    pack: Path, whole: ExpertStore, fault: str, says: str, t: int
) -> None:
    broken = threading.Event()
    faulty = Faulty(lambda n: fault if broken.is_set() and n % 3 == 0 else "")
    store = tiered(pack, 10)
    store.disk._preadv = faulty
    failed = 0
    for seed in range(30):
        (broken.set if seed % 2 else broken.clear)()
        x, ids, w = step(t, seed)
        try:
            found = store.run(2, x, ids, w)
        except PackError as error:
            failed += 1
            assert says in error.message
            assert store.disk.layouts[2].file in error.message
            assert error.hint
            broken.clear()
            found = store.run(2, x, ids, w)  # the same step again, now that the disk is well
        assert torch.equal(found, whole.run(2, x, ids, w)) or kernels.get() is None
    assert failed
    store.wait_for_orphans()
    assert store.ram.ring_left == RING


def test_the_first_read_of_an_expert_is_checked(pack: Path) -> None:
    store = tiered(pack, 10)
    store.disk._preadv = Faulty(lambda n: "flip" if n == 2 else "")
    x, ids, w = step(1, 3)
    with pytest.raises(PackError, match="checksum of expert"):
        store.run(1, x, ids, w)
    assert len(store.ram) <= 10


def test_a_check_that_fails_in_another_way_ends_the_step_too(pack: Path) -> None:
    def broken(read: Any) -> None:
        raise MemoryError("no room for a sum")

    store = tiered(pack, 10)
    store.disk._check = broken  # type: ignore[method-assign]
    x, ids, w = step(1, 3)
    with pytest.raises(PackError, match="no room for a sum"):
        store.run(1, x, ids, w)
    del store.disk._check
    store.run(1, x, ids, w)  # its threads are still there


def test_short_reads_are_read_on(pack: Path, whole: ExpertStore) -> None:
    store = tiered(pack, 4)
    store.disk._preadv = Faulty(lambda n: "short" if n % 2 else "")
    for seed in range(10):
        x, ids, w = step(3, seed)
        assert torch.equal(store.run(1, x, ids, w), whole.run(1, x, ids, w)) or not kernels.get()


def test_a_file_cut_while_it_is_in_use(pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    copy.mkdir()
    for path in pack.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    store = tiered(copy, 2)
    x, ids, w = step(1, 1)
    store.run(1, x, ids, w)
    file = copy / store.disk.layouts[1].file
    os.truncate(file, 8192 + 100)
    with pytest.raises(PackError, match=f"{file.name} (ends inside|was changed)"):
        for seed in range(2, 12):
            store.run(1, *step(1, seed))


def test_a_file_overwritten_while_it_is_in_use(pack: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    copy.mkdir()
    for path in pack.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    store = tiered(copy, 0)
    for seed in range(12):  # everything has been checked once
        store.run(1, *step(1, seed))
    layout = store.disk.layouts[1]
    with (copy / layout.file).open("r+b") as file:
        for e in range(EXPERTS):
            file.seek(layout.offset0 + e * layout.stride + 5)
            file.write(b"\x55\xaa\x11")
    with pytest.raises(PackError, match="damaged"):
        for seed in range(12, 24):
            store.run(1, *step(1, seed))


def test_a_missing_file_and_no_permission(pack: Path, tmp_path: Path) -> None:
    layouts = weights(pack).pack.expert_layout
    tier = DiskTier(tmp_path, {1: layouts(1)})
    view = memoryview(bytearray(layouts(1).stride))
    read = tier.read((1, 0), 0, view)
    tier.wait([read])
    assert read.error is not None
    assert "No such file" in read.error.message
    tier.close()
    with pytest.raises(PackError, match="closed"):
        tier.read((1, 0), 0, view)


def test_file_systems_without_direct_reads(
    pack: Path, whole: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refuses(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *args, **kwargs)

    monkeypatch.setattr(disk_module.os, "open", refuses)
    store = tiered(pack, 4)
    x, ids, w = step(1, 1)
    assert torch.equal(store.run(1, x, ids, w), whole.run(1, x, ids, w)) or not kernels.get()
    assert len(store.notes) == 1
    assert "page cache" in store.notes[0]


def test_file_systems_that_refuse_direct_reads_late(pack: Path, whole: ExpertStore) -> None:
    import fcntl

    def late(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(fd, views, offset)

    store = tiered(pack, 4)
    store.disk._preadv = late
    x, ids, w = step(1, 1)
    assert torch.equal(store.run(1, x, ids, w), whole.run(1, x, ids, w)) or not kernels.get()
    assert "page cache" in store.notes[0]


@pytest.mark.parametrize("after", [0, 1, 3, 9])
def test_a_sweep_stops_within_an_expert(pack: Path, after: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("mimo_local.experts.steps.BATCH_PAIRS", 1)
    store = tiered(pack, 6)
    asked = [0]

    def cancel() -> bool:
        asked[0] += 1
        return asked[0] > after

    with pytest.raises(CancelledError):
        store.sweep(1, *step(100, 1), cancel=cancel)
    assert asked[0] == after + 1
    store.wait_for_orphans()
    assert store.ram.ring_left == RING
    store.sweep(1, *step(100, 1))


# ---- budget and pressure -------------------------------------------------------------------------


def test_the_budget_changes_while_running(pack: Path, whole: ExpertStore) -> None:
    store = tiered(pack, 30)
    slot, chance = store.ram.slot_bytes, random.Random(1)
    for seed in range(120):
        slots = chance.choice([0, 3, 12, 30, 99])
        store.set_budget((slots + RING) * slot)
        x, ids, w = step(chance.choice([1, 4, 30]), seed)
        layer = chance.choice(LAYERS)
        found = store.run(layer, x, ids, w)
        assert torch.equal(found, whole.run(layer, x, ids, w)) or kernels.get() is None
        assert len(store.ram) <= min(slots, 30)
        assert store.ram.nbytes <= store.ram.budget
    assert store.ram.capacity == min(slots, 30)


def test_less_than_the_ring_is_refused(pack: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match="at least"):
        tiered(pack, -1)


def test_under_pressure_it_shrinks_at_once_and_grows_slowly() -> None:
    free, now = [1000], [0.0]
    guard = Pressure(10, 500, 100, free=lambda: free[0], clock=lambda: now[0])
    assert guard.wish() is None  # too early to look
    now[0] += INTERVAL
    assert guard.wish() is None  # no pressure
    free[0] = 60
    now[0] += INTERVAL
    assert guard.wish() == 500 - 40 - 10
    assert "memory is short" in guard.notes[0]
    free[0] = 400
    now[0] += INTERVAL
    assert guard.wish() is None  # not yet
    now[0] += CALM
    assert guard.wish() == 500
    assert not guard.notes
    free[0] = -10_000
    now[0] += INTERVAL
    assert guard.wish() == 0


def test_pressure_reaches_the_tier(pack: Path) -> None:
    store = tiered(pack, 30)
    for seed in range(10):
        store.run(1, *step(1, seed))
    held = len(store.ram)
    assert held > 6
    lack, now = 20 * store.ram.slot_bytes, iter([0.0, 0.0, 1.0])
    store.pressure = Pressure(
        store.ram.slot_bytes, store.ram.budget, 0, free=lambda: -lack, clock=lambda: next(now)
    )
    store.run(1, *step(1, 99))
    assert store.ram.capacity == 30 - 21
    assert store.notes


def test_pressure_reaches_the_tier_between_the_layers_of_a_long_prompt(
    pack: Path, whole: ExpertStore
) -> None:
    store, left, now = tiered(pack, 30), [1 << 40], [0.0]
    store.pressure = Pressure(
        store.ram.slot_bytes, store.ram.budget, 0, free=lambda: left[0], clock=lambda: now[0]
    )
    x, ids, w = step(300, 1)
    store.sweep(1, x, ids, w)
    assert (len(store.ram), store.ram.capacity) == (10, 30), "its share"
    left[0], now[0] = -20 * store.ram.slot_bytes, INTERVAL  # somebody lowers the limit
    found = store.sweep(2, x, ids, w)
    assert store.ram.capacity == 30 - 21
    assert store.ram.nbytes <= store.ram.budget
    assert torch.equal(found, whole.sweep(2, x, ids, w)) or kernels.get() is None


def test_which_store_a_model_gets(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = weights(pack)
    assert isinstance(open_store(opened), ExpertStore)
    few = 12 * opened.pack.expert_layout(1).stride
    rest = opened.nbytes - opened.expert_nbytes
    found = open_store(opened, ram=few + rest + 1000, spare=1000)
    assert isinstance(found, TieredStore)
    assert found.ram.capacity == 12 - RING
    folder = tiny.write(tmp_path / "m", CONFIG)
    with pytest.raises(NotEnoughMemoryError, match="checkpoint") as caught:
        open_store(open_weights(folder), ram=few)
    assert "quantize" in caught.value.hint
    monkeypatch.setattr("mimo_local.experts.opening.available_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemoryError, match="before the first expert"):
        open_store(opened)


# ---- guesses -------------------------------------------------------------------------------------


def test_guesses_never_push_anything_out_and_demand_goes_first(pack: Path) -> None:
    order: list[int] = []
    gate = threading.Event()

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        gate.wait(10)
        order.append(offset)
        return os.preadv(fd, views, offset)

    opened = weights(pack)
    layouts = {layer: opened.pack.expert_layout(layer) for layer in LAYERS}
    disk = DiskTier(opened.pack.path, layouts, depth=1, preadv=slow)
    store = tiered(pack, 4, prefetch="on", disk=disk)
    x, ids, w = step(1, 5)
    other = torch.tensor([[e for e in range(EXPERTS) if e not in ids[0]][:4]])
    store.expect(2, other)
    assert len(store._ahead) == 4
    threading.Timer(0.05, gate.set).start()
    store.run(1, x, ids, w)
    guessed = {layouts[2].offset0 + e * layouts[2].stride for e in other[0].tolist()}
    assert [o in guessed for o in order[1:5]] == [False] * 4 or layouts[1].file != layouts[2].file
    store.run(2, x, ids, w)
    assert store.meters.prefetch_wasted == 4
    assert not any(key[0] == 2 and key[1] in other[0].tolist() for key in store.ram)
    store.wait_for_orphans()
    assert store.ram.ring_left == RING


def test_wrong_guesses_are_dropped_before_anything_is_read(pack: Path) -> None:
    """What was on its way lands as nothing; the rest of it is not read."""
    begun, gate, order = threading.Event(), threading.Event(), list[int]()

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        begun.set()
        gate.wait(10)
        order.append(offset)
        return os.preadv(fd, views, offset)

    opened = weights(pack)
    layouts = {layer: opened.pack.expert_layout(layer) for layer in LAYERS}
    disk = DiskTier(opened.pack.path, layouts, depth=1, preadv=slow)
    store = tiered(pack, 4, prefetch="on", disk=disk)
    x, ids, w = step(1, 5)
    wrong = torch.tensor([e for e in range(EXPERTS) if e not in ids[0]][:4])
    store.expect(1, wrong)
    assert begun.wait(10)
    called: list[int] = []
    threading.Timer(0.05, gate.set).start()
    store.run(1, x, ids, w, meanwhile=lambda: called.append(store.ram.ring_left))
    assert called == [RING - 1 - K], "one guess was being read, K reads had begun"
    assert len(order) == 1 + K
    assert store.meters.prefetch_wasted == 4
    store.wait_for_orphans()
    assert store.ram.ring_left == RING


def test_parts_of_a_dropped_read_are_not_read(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = weights(pack)
    layouts = {layer: opened.pack.expert_layout(layer) for layer in LAYERS}
    monkeypatch.setattr(disk_module, "PART", 4096)
    gate, reads = threading.Event(), list[int]()

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        reads.append(offset)
        gate.wait(10)
        return os.preadv(fd, views, offset)

    disk = DiskTier(opened.pack.path, layouts, depth=1, preadv=slow)
    size = -(-layouts[1].stride // 4096) * 4096
    buffer = memoryview(mmap.mmap(-1, size))
    read = disk.read((1, 3), 0, buffer)
    while not reads:
        time.sleep(0.001)
    assert read.left > 1
    assert not disk.forget(read), "a part of it is being read"
    gate.set()
    disk.wait([read])
    assert (len(reads), read.error) == (1, None)
    disk.close()


def test_a_guess_that_comes_true_is_no_miss(pack: Path, whole: ExpertStore) -> None:
    store = tiered(pack, 4, prefetch="on")
    x, ids, w = step(1, 5)
    store.expect(2, ids)
    time.sleep(0.05)
    found = store.run(2, x, ids, w)
    assert store.meters.staged_hits == 4
    assert store.meters.misses == 0
    assert torch.equal(found, whole.run(2, x, ids, w)) or kernels.get() is None


@pytest.mark.parametrize(("gain", "wins"), [(1.3, True), (1.0, False), (0.7, False)])
def test_prefetching_is_on_only_while_it_wins(gain: float, wins: bool) -> None:
    trial, chance = Trial(), random.Random(1)
    on = 0
    for n in range(4000):
        on += trial.on and n >= 4 * WINDOW
        trial.observe((1 / gain if trial.on else 1.0) * chance.uniform(0.97, 1.03))
    assert trial.verdict == wins
    assert trial.gain == pytest.approx(gain, abs=0.05)
    assert on > 3600 if wins else on < 200


@pytest.mark.parametrize(("gain", "verdict"), [(1.2, True), (0.9, False)])
def test_steps_of_more_rows_do_not_fool_the_trial(gain: float, verdict: bool) -> None:
    trial, chance = Trial(), random.Random(2)
    for _ in range(4 * WINDOW):
        rows = chance.choice([1, 2, 4, 4])
        trial.observe(rows * (1 / gain if trial.on else 1.0) * chance.uniform(0.97, 1.03), rows)
    assert trial.verdict == verdict
    assert trial.gain == pytest.approx(gain, rel=0.05)


def test_a_machine_that_gets_slower_does_not_fool_the_trial() -> None:
    trial = Trial()
    for n in range(3 * WINDOW):
        trial.observe(1.0 + 0.01 * n)
    assert trial.verdict is False
    assert trial.gain == pytest.approx(1.0, abs=0.02)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    import gc

    gc.collect()
    deadline = time.monotonic() + 5
    while any(t.name == "mimo-disk" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "a reader outlived its store"
        time.sleep(0.01)
