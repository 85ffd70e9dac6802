"""MiMo-V2-Flash in its true shapes, on a 24 GB card that holds nothing: what it would take there.

No number is computed and no weight exists; shapes, dtypes and bytes are the real model's, in the
formats a pack has by default. The planner's word is checked: what it says a card holds is what lies
there, and the most that a step or a prompt takes besides stays below what it keeps free for that.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built import needs_compiler
from fake_cuda import FakeCuda, fake_cuda

from mimo_local import mtp, ops, sizes, weights
from mimo_local.cache import KVCache
from mimo_local.cache_layers import RingKV
from mimo_local.config import ModelConfig
from mimo_local.device import Devices
from mimo_local.experts import device_store
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.meters import Meters
from mimo_local.experts.store import Store
from mimo_local.experts.vram import VramTier
from mimo_local.layers import Layer, Step
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter
from mimo_local.plan import Budget, Plan, plan
from mimo_local.plan.residents import CHUNK, growing_bytes
from mimo_local.sizes import GB, PackSizes
from mimo_local.weights import Embedding, Expert, QuantLinear
from quant.formats import get_format
from quant.inventory import expected, expected_mtp, role_of
from quant.layout import ExpertLayout, plan_experts
from quant.recipe import Recipe

CUDA = torch.device("cuda")
CONTEXT = 32_768
RAW: dict[str, Any] = json.loads(Path(sizes.__file__).with_name("real_config.json").read_text())
REAL = ModelConfig.from_dict(RAW)
RECIPE = Recipe()
K = REAL.experts_per_token
pytestmark = needs_compiler


class Blank:
    """Weights of the real model that hold nothing, as a pack would store them."""

    kind = "pack"
    config = REAL
    nbytes = expert_nbytes = 0
    shapes = expected(RAW) | expected_mtp(RAW)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def tensor(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name])

    def linear(self, name: str) -> QuantLinear:
        rows, cols = self.shapes[name]
        fmt = get_format(RECIPE.format_of(role_of(name, (rows, cols)), "BF16"))
        parts = {n: torch.empty(s, dtype=d) for n, (d, s) in fmt.parts(rows, cols).items()}
        return QuantLinear(fmt, parts, rows, cols)

    def embedding(self, name: str) -> Embedding:
        return Embedding(self.linear(name))

    def expert(self, layer: int, e: int) -> Expert:
        names = [f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight" for p in ("gate", "up")]
        return Expert(*map(self.linear, [*names, names[0].replace("gate", "down")]))


class Host(Store):
    """The host's share: rows come back as they went."""

    def __init__(self) -> None:
        self.meters = Meters()

    @property
    def nbytes(self) -> dict[str, int]:
        return {}

    def resident(self, layer: int) -> bool:
        return False

    def mlps(self, layer: int) -> Any:
        raise AssertionError

    def stream(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    def held(self, layer: int, e: int) -> Expert | None:
        return Blank().expert(layer, e)

    def run(self, layer: int, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(x)

    def sweep(self, layer: int, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty_like(x)


class Chosen:
    """Ids the host has read: real numbers, in a place where tensors have none."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def tolist(self) -> list[list[int]]:
        return [list(range(row, row + K)) for row in range(self.rows)]

    def masked_fill(self, *_: Any) -> Chosen:
        return self


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    def read(self: Any) -> tuple[Any, ...]:
        self._there.wait()
        n = self._n
        return self._rows[:n], Chosen(n), self._weights[:n], None

    def blank(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def unchecked(self: Model, segments: Any) -> torch.Tensor:
        return torch.cat([segment.ids for segment in segments])

    def rows(self: Embedding, ids: torch.Tensor) -> torch.Tensor:
        return torch.empty((ids.shape[0], REAL.hidden_size))

    monkeypatch.setattr(Embedding, "rows", rows)
    monkeypatch.setattr(device_store._Letter, "read", read)
    monkeypatch.setattr(Model, "_check", unchecked)  # ids without numbers
    monkeypatch.setattr(weights, "huge_tensor", blank)
    monkeypatch.setattr(mtp, "packed_smaller", packed_smaller)
    with torch.inference_mode(), fake_cuda(real_host=False, ordering=False) as cuda:
        yield cuda


def packed_smaller(head: QuantLinear) -> QuantLinear:
    fmt = get_format("nf4")
    parts = {n: torch.empty(s, dtype=d) for n, (d, s) in fmt.parts(head.rows, head.cols).items()}
    return QuantLinear(fmt, parts, head.rows, head.cols)


def planned(vram: int, **more: Any) -> Plan:
    budget = Budget(ram=96 * GB, vram=vram * GB, disk=1000 * GB)
    return plan(REAL, PackSizes.estimate(REAL, RECIPE), budget, context=CONTEXT, **more)


def loaded(made: Plan) -> tuple[Model, VramTier | None]:
    there = [CUDA if on else torch.device("cpu") for on in made.layers_on_device]
    assert all(made.layers_on_device), "a 24 GB card holds every layer"
    narrow, wide = REAL.moe_intermediate_size, REAL.hidden_size
    shapes = {"gate_proj": (narrow, wide), "up_proj": (narrow, wide), "down_proj": (wide, narrow)}
    layout = plan_experts("", 1, REAL.n_experts, RECIPE.experts, shapes)[2]
    layouts: dict[int, ExpertLayout] = {
        spec.index: layout for spec in REAL.layers if spec.mlp == "moe"
    }
    tier = VramTier(layouts, made.expert_vram_bytes, CUDA) if made.expert_vram_bytes else None
    experts = DeviceStore(Host(), tier, CUDA, list(layouts))
    devices = Devices(tuple(there), CUDA, CUDA)
    return Model(Blank(), experts, devices=devices), tier  # type: ignore[arg-type]


def test_the_real_model_fits_a_24_gb_card_as_planned(cuda: FakeCuda) -> None:
    made = planned(24)
    assert made.device.head and made.device.drafter
    model, tier = loaded(made)
    drafter = Drafter(Blank(), model)  # type: ignore[arg-type]
    cache = model.new_cache(dtype=torch.bfloat16)
    cache.draft = drafter.new_cache(torch.bfloat16, cache.slack)
    cache.reserve(CONTEXT - 64)
    cache.length = CONTEXT - 64  # as if a long prompt had been read
    for layer in cache.layers:
        if isinstance(layer, RingKV):
            layer.first = cache.length - layer.keep
    on = made.device
    held = cuda.live - (0 if tier is None else tier.nbytes)
    expected_bytes = on.nbytes - on.work - on.hidden - on.streams
    assert held == pytest.approx(expected_bytes, rel=0.01)
    assert tier is not None
    assert tier.nbytes == pytest.approx(made.expert_vram_bytes, rel=1e-3)

    model.forward([Segment(torch.zeros(1, dtype=torch.int64), cache)])  # frequencies go up
    cache.truncate(CONTEXT - 64)
    for rows in (1, 4):
        cuda.reset()
        before = cuda.live
        with cuda.no_waits():
            hidden = model.forward([Segment(torch.zeros(rows, dtype=torch.int64), cache)])
        model.logits(hidden)
        assert cuda.peak - before <= on.work
        assert cuda.peak <= 24 * GB - on.reserve
        cache.truncate(CONTEXT - 64)
    assert model.experts.meters.vram_hits > 0


def test_a_prompt_at_the_end_of_the_context_stays_within_the_plan(cuda: FakeCuda) -> None:
    """The longest pass that is planned, at the depth where scores are largest."""
    made = planned(24)
    model, tier = loaded(made)
    on, cache = made.device, model.new_cache(dtype=torch.bfloat16)
    rows = min(on.rows, 4096)
    cache.reserve(CONTEXT)
    cache.length = CONTEXT - rows
    for layer in cache.layers:
        if isinstance(layer, RingKV):
            layer.first = cache.length - layer.keep
    cuda.reset()
    before = cuda.live
    hidden = model.prefill(Segment(torch.zeros(rows, dtype=torch.int64), cache))
    assert hidden.shape == (1, REAL.hidden_size)
    assert cuda.peak - before <= on.work + on.hidden
    assert cuda.peak + on.streams <= 24 * GB - on.reserve
    assert tier is not None


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_a_chunk_of_a_prompt_takes_no_more_than_is_kept_free(
    cuda: FakeCuda, kv_dtype: torch.dtype
) -> None:
    """One layer of each kind, at the end of a context, where keys are many."""
    made = planned(24, kv_itemsize=kv_dtype.itemsize)
    few = dataclasses.replace(REAL, layers=REAL.layers[:2], n_mtp_layers=0, mtp_layer=None)
    cache = KVCache(few, dtype=kv_dtype, device=CUDA)
    start = CONTEXT - CHUNK
    cache.reserve(CONTEXT)
    cache.length = start
    for ring in cache.layers:
        if isinstance(ring, RingKV):
            ring.first = start - ring.keep
    ropes = {s.attention: ops.RopeTable(s.rope_theta, s.rotary_dim) for s in few.layers}
    taken = {}
    for spec in few.layers:
        layer = Layer(Blank(), spec, few, Host(), device=CUDA)  # type: ignore[arg-type]
        x = torch.empty((CHUNK, REAL.hidden_size), device=CUDA)
        cuda.reset()
        before = cuda.live
        step = Step([cache], [CHUNK], ropes)
        layer.attend(x, step)
        if spec.mlp == "dense":
            layer.mix(x, step)
        taken[spec.attention, spec.mlp] = cuda.peak - before
    assert set(taken) == {("full", "dense"), ("sliding", "moe")}
    kept = made.device.work - growing_bytes(REAL, CONTEXT, kv_dtype.itemsize)
    assert 0.3 * kept < max(taken.values()) <= kept, {k: v / 1e6 for k, v in taken.items()}
