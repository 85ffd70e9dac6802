"""Prompts through experts on a device, with the CPU as the device: the same lines, real numbers.

tests/test_sim_device.py runs them on a stand-in accelerator that catches missing waits.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import kernels
from mimo_local.device import Mark
from mimo_local.errors import CancelledError, PackError
from mimo_local.experts import device_sweep, upload
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.disk import DiskTier
from mimo_local.experts.host_share import HostShare
from mimo_local.experts.passing import PassingStore
from mimo_local.experts.shares import Costs, Rates, Split
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.tiered import TieredStore
from mimo_local.experts.vram import VramTier
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

EXPERTS, K, D = 16, 4, 64
CONFIG: dict[str, Any] = tiny.config(
    "fsf", "dmm", experts=EXPERTS, top_k=K, hidden=D, moe_intermediate=64
)
LAYER, RING = 1, 2 * K
BOUND = 4e-2  # the CPU's kernels round activations to 8 bits, three times in a row

# Who gets what, whatever the rows.
DEVICE = Costs(1e-6, 1e-6, 0.0, 0.0, 1.0, 0.0, 0.0)
HOST = Costs(1.0, 1.0, 0.0, 0.0, 1e-6, 0.0, 0.0)
BOTH = Costs(1e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0)
SHARES = {"device": DEVICE, "host": HOST, "both": BOTH}


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a prefill: torch's own threads would spin where the kernels' are needed.

    Who gets what is fixed: nobody learns from how long it takes.
    """
    monkeypatch.setattr(Rates, "observe", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sweep") / "m", CONFIG)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    folder = checkpoint.parent / str(request.param)
    convert(checkpoint, folder, Recipe.for_format(str(request.param)))
    return folder


@pytest.fixture(scope="module")
def whole(pack: Path) -> ExpertStore:
    return ExpertStore(open_weights(pack))


def opened(pack: Path) -> PackWeights:
    found = open_weights(pack)
    assert isinstance(found, PackWeights)
    return found


def tiered(pack: Path, slots: int, **kwargs: Any) -> TieredStore:
    slot = opened(pack).pack.expert_layout(LAYER).stride
    return TieredStore(opened(pack), (slots + RING) * slot, reserve=0, prefetch="off", **kwargs)


def vram(pack: Path, whole: ExpertStore, experts: Sequence[int]) -> VramTier:
    layouts = {layer: opened(pack).pack.expert_layout(layer) for layer in (1, 2)}
    tier = VramTier(layouts, 8 * VramTier(layouts, 0, "cpu").slot_bytes, "cpu")
    for e in experts:
        tier.touch((LAYER, e))
        assert tier.consider((LAYER, e), whole.ram.get(LAYER)[e])
        tier.end_of_step()
    return tier


@pytest.fixture
def made() -> Iterator[Callable[..., DeviceSweep]]:
    """Makes sweeps, and closes them in the end."""
    sweeps: list[DeviceSweep] = []

    def make(inner: Store, tier: VramTier | None = None, costs: Costs = BOTH) -> DeviceSweep:
        nbytes = 3 * 64 * 64 * 4
        sweeps.append(
            DeviceSweep(
                inner, tier, "cpu", n_experts=EXPERTS, hidden=D, width=64, nbytes=nbytes,
                costs=costs,
            )
        )  # fmt: skip
        return sweeps[-1]

    yield make
    for sweep in sweeps:
        sweep.close()


def step(t: int, seed: int, gap: float = 0.0, among: int = EXPERTS) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(among, generator=g)[:K].sort()[0] for _ in range(t)]).int()
    ids[torch.rand(t, K, generator=g) < gap] = -1
    return torch.randn(t, D, generator=g), ids, torch.rand(t, K, generator=g)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 9, 100, 700])
@pytest.mark.parametrize("share", SHARES)
def test_the_numbers_of_a_sweep(
    whole: ExpertStore, made: Callable[..., DeviceSweep], share: str, t: int, way: str
) -> None:
    sweep = made(whole, costs=SHARES[share])
    x, ids, w = step(t, t, gap=0.1 if t > 2 else 0.0)
    found, wanted = sweep.run(LAYER, x, ids, w), whole.sweep(LAYER, x, ids, w)
    assert found.dtype == torch.float32
    # Without the kernels both sides work in float32.
    assert error(found, wanted) < (BOUND if way == "native" else 1e-6)


@pytest.mark.parametrize("fmt", ["mxfp4", "bf16", "checkpoint"])
def test_other_formats(checkpoint: Path, made: Callable[..., DeviceSweep], fmt: str) -> None:
    path = checkpoint
    if fmt != "checkpoint":
        path = checkpoint.parent / fmt
        convert(checkpoint, path, Recipe.for_format(fmt))
    whole = ExpertStore(open_weights(path))
    sweep = made(whole)
    x, ids, w = step(60, 5)
    assert error(sweep.run(LAYER, x, ids, w), whole.sweep(LAYER, x, ids, w)) < BOUND


def test_an_expert_chosen_by_all_rows_and_more_rows_than_one_product_takes(
    whole: ExpertStore, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr(device_sweep, "ROWS", 16)
    sweep = made(whole, costs=DEVICE)
    x, ids, w = step(100, 3, among=K)  # four experts have all rows, twelve none
    found, wanted = sweep.run(LAYER, x, ids, w), whole.sweep(LAYER, x, ids, w)
    assert error(found, wanted) < 1e-6


def test_rows_that_chose_nobody_are_zero(
    whole: ExpertStore, made: Callable[..., DeviceSweep]
) -> None:
    sweep = made(whole)
    x, ids, w = step(5, 1)
    assert not sweep.run(LAYER, x, torch.full_like(ids, -1), w).any()
    ids[2] = -1
    found = sweep.run(LAYER, x, ids, w)
    assert not found[2].any() and found[[0, 1, 3, 4]].any(1).all()


def test_ids_may_be_int64_and_x_bfloat16(
    whole: ExpertStore, made: Callable[..., DeviceSweep]
) -> None:
    sweep = made(whole)
    x, ids, w = step(50, 8)
    wanted = whole.sweep(LAYER, x, ids, w)
    assert error(sweep.run(LAYER, x.bfloat16(), ids.long(), w), wanted) < BOUND


def test_what_lies_where_changes_no_bit_of_the_devices_share(
    pack: Path, whole: ExpertStore, made: Callable[..., DeviceSweep]
) -> None:
    """From RAM, from disk, from VRAM; and the CPU's share is the same bits from run to run."""
    x, ids, w = step(200, 4)
    wanted = made(whole, costs=DEVICE).run(LAYER, x, ids, w)
    tier = vram(pack, whole, [2, 3, 11])
    for slots in (0, 5, 40):
        store = tiered(pack, slots)
        found = made(store, tier, DEVICE).run(LAYER, x, ids, w)
        assert torch.equal(found, wanted)
        mixed = [made(store, tier, BOTH).run(LAYER, x, ids, w) for _ in range(2)]
        assert torch.equal(*mixed) and error(mixed[0], wanted) < BOUND
        store.close()


def test_a_share_of_both_is_one_of_both(
    whole: ExpertStore, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    plain = HostShare.give

    def give(self: HostShare, expert: Any, n: int) -> None:
        given.append(n)
        plain(self, expert, n)

    monkeypatch.setattr(HostShare, "give", give)
    x, ids, w = step(100, 6)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    for costs, least, most in ((DEVICE, 0, 0), (BOTH, 7, 9), (HOST, 16, 16)):
        given.clear()
        made(whole, costs=costs).run(LAYER, x, ids, w)
        assert least <= len(given) <= most
        assert sum(given) <= sum(counts)


def test_both_sides_work_at_the_same_time(
    whole: ExpertStore, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun: one after the other they would never end."""
    there, here = threading.Event(), threading.Event()
    product, multiply = DeviceSweep.mlp, HostShare._multiply

    def mlp(self: DeviceSweep, *args: Any) -> Any:
        there.set()
        assert here.wait(60)
        return product(self, *args)

    def share(self: HostShare, *args: Any) -> float:
        here.set()
        assert there.wait(60)
        return multiply(self, *args)

    monkeypatch.setattr(DeviceSweep, "mlp", mlp)
    monkeypatch.setattr(HostShare, "_multiply", share)
    assert made(whole, costs=BOTH).run(LAYER, *step(60, 1)).isfinite().all()
    assert there.is_set() and here.is_set()


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [0, 3, 40])
@pytest.mark.parametrize("share", SHARES)
def test_each_expert_is_read_once_and_what_answers_need_stays(
    pack: Path, made: Callable[..., DeviceSweep], share: str, slots: int
) -> None:
    store = tiered(pack, slots)
    for seed in range(6):
        store.run(LAYER, *step(1, seed))
    kept, before = set(store.ram), store.meters.copy()
    x, ids, w = step(120, 7)
    made(store, costs=SHARES[share]).run(LAYER, x, ids, w)
    used = store.meters.since(before)
    stride = opened(pack).pack.expert_layout(LAYER).stride
    touched = {e for e in ids.flatten().tolist() if (LAYER, e) not in kept}
    assert used.disk_bytes == used.sweep_bytes == len(touched) * stride
    # It fills what nobody uses (a layer's share of it), and pushes nothing out.
    room = min(slots - len(kept), slots // 2 - len(kept))
    assert kept <= set(store.ram) and len(store.ram) == len(kept) + min(len(touched), max(0, room))
    assert store.ram.ring_left + len(store._orphans) == RING
    store.close()


def test_experts_in_vram_are_not_read(
    pack: Path, whole: ExpertStore, made: Callable[..., DeviceSweep]
) -> None:
    tier, store = vram(pack, whole, [0, 1, 2, 3]), tiered(pack, 0)
    x, ids, w = step(60, 2, among=6)
    found = made(store, tier, DEVICE).run(LAYER, x, ids, w)
    stride = opened(pack).pack.expert_layout(LAYER).stride
    assert store.disk.bytes_read == 2 * stride
    assert error(found, whole.sweep(LAYER, x, ids, w)) < BOUND
    assert {key[1] for key in tier._slot} == {0, 1, 2, 3}
    store.close()


@pytest.mark.parametrize("share", SHARES)
def test_others_may_step_through_the_store_when_a_prompt_asks(
    pack: Path,
    whole: ExpertStore,
    made: Callable[..., DeviceSweep],
    monkeypatch: pytest.MonkeyPatch,
    share: str,
) -> None:
    monkeypatch.setattr(device_sweep, "ASK_S", 0.0)  # between any two experts
    for slots in (0, 2, 6, 40):
        store, asked = tiered(pack, slots), 0

        def between(store: TieredStore = store) -> bool:
            nonlocal asked
            asked += 1
            other = step(asked % 3 + 1, asked)
            wanted = whole.run(LAYER, *other)
            assert torch.equal(store.run(LAYER, *other), wanted)
            return False

        x, ids, w = step(150, slots)
        sweep = made(store, costs=SHARES[share])
        found = sweep.run(LAYER, x, ids, w, cancel=between)
        assert torch.equal(found, sweep.run(LAYER, x, ids, w)) and asked >= EXPERTS // 2
        assert store.ram.ring_left + len(store._orphans) == RING
        store.close()


def test_no_buffer_is_filled_and_no_slot_overwritten_while_it_is_in_use(
    whole: ExpertStore, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in device computes at once, so it cannot see these two: the order of the marks."""
    sweep = made(whole, costs=DEVICE)
    log: list[tuple[object, str]] = []
    for name in ("set", "hold", "wait"):
        plain = getattr(Mark, name)

        def noted(self: Mark, *args: Any, name: str = name, plain: Any = plain) -> None:
            log.append((self, name if not args else f"{name} {args[0] is sweep.uploader._copies}"))
            plain(self, *args)

        monkeypatch.setattr(Mark, name, noted)
    plain_copy = upload._copy

    def copy(base: int, *args: Any) -> None:
        log.append((base, "fill"))
        plain_copy(base, *args)

    monkeypatch.setattr(upload, "_copy", copy)
    sweep.run(LAYER, *step(100, 1))
    assert sum(what == "fill" for _, what in log) == EXPERTS
    for slot in sweep.uploader._slots:
        mine = {id(slot.arrived): "arrived", id(slot.used): "used"}
        seen = [
            (mine.get(id(who), "buffer"), what)
            for who, what in log
            if id(who) in mine or who == slot.host.data_ptr()
        ]
        one = [
            ("arrived", "wait"), ("buffer", "fill"), ("used", "hold True"), ("arrived", "set"),
            ("arrived", "hold False"), ("used", "set"),
        ]  # fmt: skip
        assert seen == one * (len(seen) // len(one)) and len(seen) >= 5 * len(one)


# ---- stopped on the way --------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_a_cancel_between_any_two_experts_leaves_everything_in_order(
    pack: Path,
    made: Callable[..., DeviceSweep],
    monkeypatch: pytest.MonkeyPatch,
    share: str,
) -> None:
    monkeypatch.setattr(device_sweep, "ASK_S", 0.0)
    store = tiered(pack, 3)
    sweep = made(store, costs=SHARES[share])
    x, ids, w = step(90, 1)
    wanted, asks = sweep.run(LAYER, x, ids, w), 0

    def counted() -> bool:
        nonlocal asks
        asks += 1
        return False

    sweep.run(LAYER, x, ids, w, cancel=counted)
    assert asks >= EXPERTS // 2
    for at in range(asks):
        left = iter(range(asks))
        with pytest.raises(CancelledError):
            sweep.run(LAYER, x, ids, w, cancel=lambda left=left, at=at: next(left) == at)
        store.wait_for_orphans()
        assert store.ram.ring_left == RING and sweep.share.idle
    assert torch.equal(sweep.run(LAYER, x, ids, w), wanted)
    store.close()


def test_a_prompt_asks_now_and_then_and_at_once(
    whole: ExpertStore, made: Callable[..., DeviceSweep]
) -> None:
    x, ids, w = step(30, 1)
    with pytest.raises(CancelledError):
        made(whole, costs=DEVICE).run(LAYER, x, ids, w, cancel=lambda: True)


def test_what_a_layer_took_is_learnt_from(
    whole: ExpertStore, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer experts than fill the slots several times: only that they took longer."""
    seen: list[tuple[Split, float | None, float | None]] = []
    monkeypatch.setattr(Rates, "observe", lambda _, *args: seen.append(args))
    slow = dataclasses.replace(BOTH, upload=1e3, host_expert=1e3)
    for costs in (DEVICE, BOTH, slow, HOST):
        made(whole, costs=costs).run(LAYER, *step(60, 1))
    (_, all_s, none_s), (_, late_s, some_s), (_, early_s, _), (_, _, host_s) = seen
    assert all_s is not None and 0 < all_s < 60 and none_s is None
    assert late_s is not None and some_s is not None and 0 < some_s < 60
    assert early_s is None
    assert host_s is not None and 0 < host_s < 60


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("broken", [0, 7, 15])
def test_an_expert_that_cannot_be_read_is_said_and_everything_goes_on(
    pack: Path, made: Callable[..., DeviceSweep], share: str, broken: int
) -> None:
    layouts = {layer: opened(pack).pack.expert_layout(layer) for layer in (1, 2)}
    bad, ill = layouts[LAYER].offset0 + broken * layouts[LAYER].stride, True

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        if ill and bad <= at < bad + layouts[LAYER].stride:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, views, at)

    store = tiered(pack, 0, disk=DiskTier(pack, layouts, preadv=preadv))
    sweep = made(store, costs=SHARES[share])
    x, ids, w = step(80, 2)
    with pytest.raises(PackError, match=f"expert {broken} of layer 1.*Input/output"):
        sweep.run(LAYER, x, ids, w)
    store.wait_for_orphans()
    assert store.ram.ring_left == RING
    ill = False
    assert torch.equal(
        sweep.run(LAYER, x, ids, w), made(store, costs=SHARES[share]).run(LAYER, x, ids, w)
    )
    store.close()


def test_what_the_cpus_thread_cannot_do_is_raised(
    pack: Path, made: Callable[..., DeviceSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise MemoryError

    store = tiered(pack, 0)
    sweep = made(store, costs=BOTH)
    x, ids, w = step(80, 2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(HostShare, "_multiply", fails)
        sweep.run(LAYER, x, ids, w)
    store.wait_for_orphans()
    assert store.ram.ring_left == RING and sweep.share.idle
    assert sweep.run(LAYER, x, ids, w).isfinite().all()
    store.close()


def test_threads_end_with_the_sweep(whole: ExpertStore) -> None:
    sweep = DeviceSweep(
        whole, None, "cpu", n_experts=EXPERTS, hidden=D, width=64, nbytes=1 << 16, costs=BOTH
    )
    sweep.run(LAYER, *step(50, 1))
    names = {thread.name.split("_")[0] for thread in threading.enumerate()}
    assert {"mimo-share", "mimo-upload"} <= names
    sweep.close()
    left = [t.name for t in threading.enumerate() if t.name.startswith(("mimo-share", "mimo-up"))]
    assert left == []


# ---- what stores lend ----------------------------------------------------------------------------


def lent(expert: Any) -> list[bytes]:
    return [
        bytes(part.contiguous().view(torch.uint8).numpy())
        for matrix in (expert.gate, expert.up, expert.down)
        for part in matrix.parts.values()
    ]


@pytest.mark.parametrize(("held", "slots"), [(1, 1), (1, 4), (3, 3), (3, 8)])
@pytest.mark.parametrize("kind", ["ram", "disk", "some", "passing"])
def test_a_stream_gives_each_expert_in_order_and_holds_the_last_ones(
    pack: Path, whole: ExpertStore, kind: str, held: int, slots: int
) -> None:
    stores: dict[str, Callable[[], Store]] = {
        "ram": lambda: whole,
        "disk": lambda: tiered(pack, 0),
        "some": lambda: tiered(pack, 20),
        "passing": lambda: PassingStore(opened(pack), exact=False),
    }
    store, wanted = stores[kind](), {9: 1, 2: 5, 14: 2, 3: 7, 0: 1, 8: 1}
    seen = []
    for e, expert in store.stream(LAYER, wanted, held=held, slots=slots):
        seen.append((e, expert))
        for other, still in seen[-held:]:
            assert lent(still) == lent(whole.ram.get(LAYER)[other])
    assert [e for e, _ in seen] == sorted(wanted)
    if isinstance(store, TieredStore):
        assert store.ram.ring_left == RING
        # A layer's share of the room is filled with the experts most rows chose.
        if kind == "some":
            assert set(store.ram) == {(LAYER, e) for e in wanted}
    store.close()


def test_a_stream_reads_ahead_within_its_slots(pack: Path) -> None:
    store = tiered(pack, 0)
    stream = store.stream(LAYER, dict.fromkeys(range(10), 1), held=2, slots=4)
    for _ in range(3):
        next(stream)
        assert RING - store.ram.ring_left == 4
    stream.close()
    store.wait_for_orphans()
    assert store.ram.ring_left == RING
    store.close()


def test_of_a_full_layer_the_most_wanted_stay(pack: Path) -> None:
    store = tiered(pack, 6)  # three for each of the two layers
    counts = {e: e * 7 % 16 for e in range(16)}
    for _ in store.stream(LAYER, counts, slots=4):
        pass
    best = sorted(counts, key=lambda e: -counts[e])[:3]
    assert set(store.ram) == {(LAYER, e) for e in best}
    store.close()
