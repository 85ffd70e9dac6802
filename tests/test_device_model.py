"""The whole model by the accelerator's way, the CPU as that device: the numbers of the host's way.

Float32 on both sides and no kernels, so that nothing but the order of sums differs: an error of
routing, of a mask or of a place in a cache would be a thousand times larger.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mimo_local import device_attention, kernels, ops
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
from mimo_local.weights import PackWeights, open_weights
from quant import on_device
from quant.convert import Recipe, convert
from quant.formats import get_format

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = tiny.config("fsfs", "dmmm", experts=16, top_k=4, hidden=64)
CLOSE = 2e-5


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    convert(
        tiny.write(folder / "m", CONFIG, mtp_layers=2),
        folder / "pack",
        Recipe.for_format(str(request.param)),
    )
    return folder / "pack"


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)


def on_host(pack: Path) -> Model:
    weights = open_weights(pack)
    return Model(weights, ExpertStore(weights))


def on_device_(
    pack: Path, *, slots: int = 6, disk: bool = True, devices: Devices | None = None
) -> Model:
    weights = open_weights(pack)
    assert isinstance(weights, PackWeights)
    layouts = {n: weights.pack.expert_layout(n) for n in weights.pack.expert_layers}
    one = VramTier(layouts, 0, CPU).slot_bytes
    inner: Store = ExpertStore(weights)
    if disk:
        inner = TieredStore(weights, 24 * layouts[1].stride, reserve=0, prefetch="on")
    experts = DeviceStore(inner, VramTier(layouts, slots * one, CPU), CPU, list(layouts))
    return Model(weights, experts, devices=devices or Devices.all_on(CPU, 4, pretend=True))


def ids(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG["vocab_size"], (n,), generator=generator)


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def step(model: Model, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    return model.logits(model.forward([Segment(tokens, cache)]))


@pytest.mark.parametrize("disk", [True, False])
def test_steps_of_all_lengths_give_the_hosts_logits(pack: Path, disk: bool) -> None:
    host, device = on_host(pack), on_device_(pack, disk=disk)
    here, there = host.new_cache(), device.new_cache()
    for i, t in enumerate([40, 1, 1, 4, 1, 8, 1, 17, 2, 130, 1, 3]):
        tokens = ids(t, i)
        assert off(step(device, tokens, there), step(host, tokens, here)) < CLOSE
    assert device.experts.meters.vram_hits > 5
    assert device.experts.meters.uploads > 3


def test_prompts_read_layer_by_layer_give_the_hosts_logits(pack: Path) -> None:
    host, device = on_host(pack), on_device_(pack)
    here, there = host.new_cache(), device.new_cache()
    for n in (700, 300):
        a = host.prefill(Segment(ids(n), here), tail=5)
        b = device.prefill(Segment(ids(n), there), tail=5)
        assert off(b, a) < CLOSE
    assert off(step(device, ids(1), there), step(host, ids(1), here)) < CLOSE


class Mixed(Devices):
    """Layers whose device is given are on it though it is the CPU; the others are on the host."""

    def of(self, device: torch.device) -> torch.device | None:
        return device if device.index is not None else None


@pytest.mark.parametrize("on", [(0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1)])
def test_layers_may_be_on_both_sides(pack: Path, on: tuple[int, ...]) -> None:
    first = torch.device("cpu", 0)
    mixed = Mixed(tuple(first if there else CPU for there in on), CPU, CPU)
    host, model = on_host(pack), on_device_(pack, devices=mixed)
    assert [layer.device is not None for layer in model.layers] == [bool(there) for there in on]
    assert {layer.moe.experts for layer in model.layers[1:]} == {
        model.experts if there else model.experts.host for there in on[1:]
    }
    a, b = host.new_cache(), model.new_cache()
    for i, t in enumerate([20, 1, 4, 1]):
        assert off(step(model, ids(t, i), b), step(host, ids(t, i), a)) < CLOSE


def test_a_shared_pass_is_that_of_each_sequence_alone(pack: Path) -> None:
    device = on_device_(pack)
    caches = [device.new_cache() for _ in range(3)]
    alone = [device.new_cache() for _ in range(3)]
    for i, cache in enumerate(caches):
        device.forward([Segment(ids(5 + i, i), cache)])
        device.forward([Segment(ids(5 + i, i), alone[i])])
    shared = device.forward([Segment(ids(2, 9 + i), cache) for i, cache in enumerate(caches)])
    for i, rows in enumerate(torch.split(shared, 2)):
        assert off(rows, device.forward([Segment(ids(2, 9 + i), alone[i])])) < CLOSE


def test_going_back_and_restart_points_work_where_the_rows_are(pack: Path) -> None:
    device = on_device_(pack)
    cache, straight = device.new_cache(), device.new_cache()
    device.forward([Segment(ids(150), cache)])
    point = cache.snapshot()
    device.forward([Segment(ids(3, 1), cache)])
    cache.truncate(150)
    device.forward([Segment(ids(200, 2), cache)])
    cache.restore(point)
    device.forward([Segment(ids(150), straight)])
    assert off(step(device, ids(1, 3), cache), step(device, ids(1, 3), straight)) < 1e-6


@pytest.mark.parametrize("pack", ["int8"], indirect=True)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_change_no_id(pack: Path, temperature: float) -> None:
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=5)
    answers = []
    for drafting in (False, True):
        model = on_device_(pack, disk=False)
        how, cache = None, model.new_cache()
        if drafting:
            drafter = Drafter(open_weights(pack), model)
            cache.draft = drafter.new_cache(torch.float32, cache.slack)
            how = Drafting(drafter, DraftController(2, fixed=2))
        answers.append(list(generate(model, cache, ids(30).tolist(), params, drafting=how)))
    assert len(answers[0]) == 30
    assert answers[0] == answers[1]


@pytest.mark.parametrize("pack", ["int8"], indirect=True)
def test_the_drafters_guesses_are_the_hosts(pack: Path) -> None:
    found = []
    for model in (on_host(pack), on_device_(pack)):
        drafter, cache = Drafter(open_weights(pack), model, small_head=False), model.new_cache()
        state = drafter.new_cache(torch.float32, cache.slack)
        cache.draft = state
        hidden = model.forward([Segment(ids(50), cache)])
        state.add(hidden, cache.length)
        found.append(list(drafter.drafts(cache, [*ids(50).tolist(), 7])))
    assert [guess for guess, _ in found[0]] == [guess for guess, _ in found[1]]
    assert [p for _, p in found[0]] == pytest.approx([p for _, p in found[1]], rel=1e-3)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("window", [None, 20, 129])
@pytest.mark.parametrize("sink", [False, True])
def test_attention_is_that_of_the_host(
    window: int | None, sink: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr(device_attention, "_has_fused", lambda device: True)
        monkeypatch.setattr(device_attention, "_fused", plain_fused)
    for t, before in itertools.product([1, 2, 16, 17, 40, 300], [0, 5, 130, 700]):
        first = 0 if window is None else max(0, before - window - 7)
        q = torch.randn(t, 8, 24)
        k, v = torch.randn(before + t - first, 2, 24), torch.randn(before + t - first, 2, 16)
        bias = torch.randn(8) * 2 if sink else None
        args = {"start": before, "first": first, "window": window, "sink": bias}
        wanted = ops.attention(q, k, v, **args)  # type: ignore[arg-type]
        assert off(device_attention.attention(q, k, v, **args), wanted) < 3e-6  # type: ignore[arg-type]


def plain_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What CUDA's kernel computes, by its definition."""
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[1:]).triu_(1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


# ---- a stored matrix -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", on_device.FORMATS)
def test_products_are_those_of_the_stored_matrix(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "_UNPACKED", 20 * 128)  # several pieces
    fmt, w, x = get_format(name), torch.randn(96, 128), torch.randn(5, 128)
    parts = fmt.pack(w)
    there = on_device.upload(fmt, parts, CPU)
    assert sum(part.nbytes for part in there.values()) == on_device.nbytes_there(name, 96, 128, CPU)
    wanted = x @ fmt.unpack(parts).T
    assert off(on_device.product(x, name, there, 96, 128), wanted) < 1e-6
    below = on_device.below(name, there, 32, 128)
    assert off(on_device.product(x, name, below, 64, 128), wanted[:, 32:]) < 1e-6


def test_every_mxfp4_code_and_scale_is_exact_in_bfloat16() -> None:
    fmt = get_format("mxfp4")
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    scales = torch.arange(60, 140, 5, dtype=torch.uint8).repeat(40, 1)
    wanted = fmt.unpack({"codes": codes, "scales": scales})
    found = on_device.mxfp4_values(codes.flatten(), scales.flatten(), torch.bfloat16)
    assert torch.equal(found.float().view(40, 512), wanted)
