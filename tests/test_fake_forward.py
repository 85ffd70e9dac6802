"""Every forward path under CUDA tensors that hold nothing: prefill, decode, verify, all tiers.

No operator may get tensors of two devices, no work may touch bytes another queue is not done with,
and a step may wait for the device once a layer of experts, for their choice, and nowhere else. The
host's half is real: stores, disk and kernels. tests/fake_cuda.py says what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from built import needs_compiler
from fake_cuda import FakeCuda, fake_cuda

from mimo_local.cache import KVCache
from mimo_local.device import Devices
from mimo_local.draft_control import DraftController
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.tiered import TieredStore
from mimo_local.experts.vram import VramTier
from mimo_local.generate import Drafting, generate
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter
from mimo_local.sampler import SamplingParams
from mimo_local.session_rows import full_rows, read_into, rows_like, write_parts
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

CUDA = torch.device("cuda")
CONFIG: dict[str, Any] = tiny.config("fsfs", "dmmm", experts=16, top_k=4, hidden=64)
MIXTURES = 3
pytestmark = needs_compiler


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake")
    checkpoint = tiny.write(folder / "m", CONFIG, mtp_layers=2)
    convert(checkpoint, folder / "pack", Recipe.for_format(str(request.param)))
    return folder / "pack"


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with torch.inference_mode(), fake_cuda() as cuda:
        yield cuda
        for model in _OPENED:
            model.experts.close()
        _OPENED.clear()


_OPENED: list[Model] = []


TIERS = {"all in RAM": (0, False), "VRAM and RAM": (6, False), "VRAM, RAM and disk": (6, True)}


def opened(pack: Path, tiers: str = "VRAM, RAM and disk", **more: Any) -> Model:
    slots, disk = TIERS[tiers]
    weights = open_weights(pack)
    assert isinstance(weights, PackWeights)
    layouts = {n: weights.pack.expert_layout(n) for n in weights.pack.expert_layers}
    one = VramTier(layouts, 0, CUDA).slot_bytes
    inner: Store = ExpertStore(weights)
    if disk:
        inner = TieredStore(weights, 24 * layouts[1].stride, reserve=0, prefetch="on")
    vram = VramTier(layouts, slots * one, CUDA) if slots else None
    experts = DeviceStore(inner, vram, CUDA, list(layouts))
    _OPENED.append(Model(weights, experts, **{"devices": Devices.all_on(CUDA, 4), **more}))
    return _OPENED[-1]


def ids(n: int) -> torch.Tensor:
    return torch.arange(n) % CONFIG["vocab_size"]


def warm(model: Model, steps: int = 4, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    """A cache with a prompt and some steps: experts have come into VRAM, tables have grown."""
    cache = model.new_cache(dtype=dtype)
    model.forward([Segment(ids(20), cache)])
    for _ in range(steps):
        model.forward([Segment(ids(1), cache)])
    return cache


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_step_waits_for_the_choice_of_experts_alone(
    pack: Path, cuda: FakeCuda, tiers: str, rows: int
) -> None:
    model = opened(pack, tiers)
    cache = warm(model)
    cuda.reset()
    before = model.experts.meters.copy()
    with cuda.no_waits():
        hidden = model.forward([Segment(ids(rows), cache)])
    # Each layer's choice; results on their way up; a staging buffer of an upload that goes on.
    assert cuda.count.waits <= MIXTURES * (1 + 1) + model.experts.meters.since(before).uploads
    assert (cuda.count.blocking, cuda.count.unpinned) == (0, 0)
    assert model.experts.meters.since(before).steps == (MIXTURES if "disk" in tiers else 0)
    if "VRAM" in tiers:
        assert model.experts.meters.since(before).vram_hits > 0
    logits = model.logits(hidden)
    assert (logits.device.type, logits.shape) == ("cpu", (rows, CONFIG["vocab_size"]))
    assert cuda.count.blocking == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_prompts_are_read_on_the_device(pack: Path, cuda: FakeCuda, dtype: torch.dtype) -> None:
    model = opened(pack)
    cache = warm(model, dtype=dtype)
    for n in (30, 700):  # in chunks; layer by layer
        hidden = model.prefill(Segment(ids(n), cache), tail=3)
        assert (hidden.device.type, hidden.shape[1]) == ("cuda", 64)
    assert cache.length == 20 + 4 + 30 + 700


def test_sequences_share_a_pass(pack: Path, cuda: FakeCuda) -> None:
    model = opened(pack)
    caches = [warm(model, 1) for _ in range(3)]
    with cuda.no_waits():
        hidden = model.forward([Segment(ids(2), cache) for cache in caches])
    assert hidden.shape == (6, 64)


def test_going_back_and_restart_points(pack: Path, cuda: FakeCuda) -> None:
    model = opened(pack, "VRAM and RAM")
    cache = warm(model)
    point = cache.snapshot()
    assert all(p.device.type == "cpu" for _, rows in point.rings.values() for p in rows.values())
    model.forward([Segment(ids(3), cache)])
    cache.truncate(cache.length - 2)
    cache.restore(point)
    other = model.new_cache(dtype=torch.bfloat16)
    cache.fork(other, None, [point])
    model.forward([Segment(ids(2), other)])


def test_an_answer_is_drafted_and_verified(pack: Path, cuda: FakeCuda) -> None:
    model = opened(pack)
    drafter, cache = Drafter(open_weights(pack), model), model.new_cache(dtype=torch.bfloat16)
    cache.draft = drafter.new_cache(torch.bfloat16, cache.slack)
    how = Drafting(drafter, DraftController(2, fixed=2))
    params = SamplingParams(max_tokens=6, temperature=0.0)
    assert len(list(generate(model, cache, ids(12).tolist(), params, drafting=how))) == 6


@pytest.mark.parametrize("on", [(0, 0, 1, 1), (1, 1, 0, 0), (1, 0, 1, 0)])
def test_layers_on_both_sides(pack: Path, cuda: FakeCuda, on: tuple[int, ...]) -> None:
    host = torch.device("cpu")
    where = Devices(tuple(CUDA if there else host for there in on), CUDA, host)
    model = opened(pack, devices=where)
    cache = warm(model)
    assert [layer.k.device.type for layer in cache.layers] == ["cuda" if o else "cpu" for o in on]
    cuda.reset()
    model.forward([Segment(ids(1), cache)])
    assert cuda.count.blocking <= sum(a > b for a, b in zip(on, (*on[1:], 1), strict=True))
    model.prefill(Segment(ids(700), cache))


def test_a_session_rests_on_disk_and_comes_back(pack: Path, cuda: FakeCuda, tmp_path: Path) -> None:
    """Rows of the device go to a file and from it: restart points stay in this machine's memory."""
    model = opened(pack, "VRAM and RAM")
    cache = warm(model)
    point = cache.snapshot()
    back = model.new_cache(dtype=torch.bfloat16)
    rows = list(full_rows(cache, cache.length))
    assert {part.device.type for part in rows} == {"cuda"}
    with (tmp_path / "rows").open("wb") as file:
        crcs = write_parts(file.fileno(), rows, lambda: False)
    blank = [part for kept in back.blank(cache.length).values() for part in kept.values()]
    with (tmp_path / "rows").open("rb") as file:
        assert tuple(read_into(file.fileno(), part) for part in blank) == crcs
    ring = next(layer for layer in back.layers if layer.kind == "swa")
    assert {part.device.type for part in rows_like(ring.stored, 5).values()} == {"cpu"}
    back.restore(back.adopt(point.length, point.rings, point.draft))
    model.forward([Segment(ids(2), back)])
