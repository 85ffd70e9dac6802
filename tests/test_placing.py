"""placing: which card, why none, and accelerate's map of layers against the planner's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from mimo_local import hardware, placing
from mimo_local import sizes as counting
from mimo_local.config import ModelConfig
from mimo_local.device import HOST
from mimo_local.errors import UsageError
from mimo_local.hardware import Gpu
from mimo_local.plan import Budget, Plan, plan
from mimo_local.plan.planner import gains
from mimo_local.random_weights import shape_config
from mimo_local.settings import Draft, Settings
from mimo_local.sizes import GB, PackSizes
from mimo_local.weights import PackWeights, shapes
from quant.inventory import expected_mtp, role_of
from quant.recipe import Recipe

RAW = json.loads((Path(counting.__file__).with_name("real_config.json")).read_text())
REAL = ModelConfig.from_dict(RAW)
CUDA = torch.device("cuda", 0)
RECIPES = (Recipe(), Recipe.uniform("nf4"), Recipe.uniform("bf16"), Recipe.for_format("mxfp4"))


def real_pack(recipe: Recipe) -> PackWeights:
    """The names, formats and shapes of a pack of the real model; no bytes."""
    named = {**dict(shapes(REAL, experts=False)), **expected_mtp(RAW)}
    entries = {}
    for name, shape in named.items():
        role = role_of(name, shape)
        fmt = recipe.format_of(role, "F32")
        entries[name] = SimpleNamespace(format=fmt, shape=shape)
    return cast(PackWeights, SimpleNamespace(config=REAL, pack=SimpleNamespace(tensors=entries)))


WEIGHTS = {recipe: real_pack(recipe) for recipe in RECIPES}


@given(
    vram=st.integers(12, 120).map(lambda n: n * GB // 4),
    context=st.sampled_from([512, 8192, 32_768, 131_072]),
    recipe=st.sampled_from(RECIPES),
    drafting=st.sampled_from(["auto", "off"]),
)
@tries(max_examples=25, deadline=None)
def test_accelerates_map_is_the_planners(
    vram: int, context: int, recipe: Recipe, drafting: Draft
) -> None:
    budget = Budget(ram=64 * GB, vram=vram, disk=1000 * GB)
    found = plan(REAL, PackSizes.estimate(REAL, recipe), budget, context=context, drafting=drafting)
    if not found.device.layers:
        return
    devices = placing.map_layers(WEIGHTS[recipe], found, CUDA)
    assert tuple(device == CUDA for device in devices.layers) == found.layers_on_device
    assert (devices.head == CUDA, devices.drafter == CUDA) == (
        found.device.head,
        found.device.drafter,
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 300))
@tries(max_examples=50, deadline=None)
def test_a_map_never_exceeds_its_room_and_takes_the_first_that_fit(
    sizes: list[int], room: int
) -> None:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        model = torch.nn.Module()
        for i, n in enumerate(sizes):
            model.add_module(f"layers_{i}", placing._Part([(torch.uint8, (n,))]))
    found = placing.fitting(model, room)
    expected, used = set(), 0
    for i, n in enumerate(sizes):
        if used + n > room:
            break
        used += n
        expected.add(f"layers_{i}")
    assert found == expected


def test_what_is_kept_free_by_accelerate_alone_would_cost_layers() -> None:
    """Why `fitting` adds a child: by itself the map keeps the largest one's room."""
    from accelerate import init_empty_weights
    from accelerate.utils import infer_auto_device_map

    with init_empty_weights(include_buffers=True):
        model = torch.nn.Module()
        for i in range(10):
            model.add_module(f"layers_{i}", placing._Part([(torch.uint8, (10,))]))
    limits = {0: 95, "cpu": 1000}
    alone = infer_auto_device_map(
        model, limits, no_split_module_classes=["_Part"], clean_result=False
    )
    assert sum(device == 0 for device in alone.values()) == 8
    assert len(placing.fitting(model, 95)) == 9


def test_sizes_of_the_skeleton_are_those_of_the_plan_to_the_byte() -> None:
    from accelerate.utils import compute_module_sizes

    for recipe, weights in WEIGHTS.items():
        pack = PackSizes.estimate(REAL, recipe)
        found = plan(REAL, pack, Budget(ram=64 * GB, vram=80 * GB, disk=1000 * GB))
        sizes = compute_module_sizes(placing.skeleton(weights, found, CUDA))
        there = found.device
        assert there.drafter and sizes["drafter"] == there.drafter_bytes == pack.vram_drafter
        assert sizes["head"] == there.head_bytes
        layers = sum(sizes[f"layers_{i}"] for i in range(48))
        assert layers == there.attention + there.dense + there.exact + there.kv + there.restarts


def test_fewer_layers_than_planned_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        placing, "fitting", lambda model, room: {f"layers_{i}" for i in range(40)} | {"head"}
    )
    found = plan(REAL, PackSizes.estimate(REAL), Budget(ram=64 * GB, vram=24 * GB, disk=1000 * GB))
    devices = placing.map_layers(WEIGHTS[Recipe()], found, CUDA)
    assert [device == CUDA for device in devices.layers] == [True] * 40 + [False] * 8
    assert devices.head == devices.drafter == HOST, "the head comes after all layers"


# -- which card ------------------------------------------------------------------------------------


class Cards:
    """torch.cuda and accelerate with these cards: (name, capability, GB, GB free)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.given([])

    def given(
        self,
        cards: list[tuple[str, tuple[int, int], int, int]],
        *,
        shared: bool = False,
        version: str | None = "13.0",
        hip: str | None = None,
        driver: list[str] | None = None,
    ) -> None:
        limits: dict[int | str, int] = {i: card[3] * GB for i, card in enumerate(cards)}
        limits |= {} if shared else {"cpu": 64 * GB}
        names = [card[0] for card in cards] if driver is None else driver
        self.patch.setattr(placing, "memory_limits", lambda: limits)
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        self.patch.setattr(torch.cuda, "get_device_name", lambda i: cards[i][0])
        self.patch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i][1])
        self.patch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda i: SimpleNamespace(total_memory=cards[i][2] * GB),
        )
        self.patch.setattr(torch.version, "cuda", version)
        self.patch.setattr(torch.version, "hip", hip)
        self.patch.setattr(
            hardware, "gpus", lambda: tuple(Gpu(name, 24 * GB, 23 * GB) for name in names)
        )


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


ADA = ("NVIDIA GeForce RTX 4090", (8, 9), 24, 22)
TURING = ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11, 10)


def test_the_card_with_most_free_memory_is_taken(cards: Cards) -> None:
    cards.given([TURING, ADA, ("NVIDIA GeForce RTX 3060", (8, 6), 12, 11)])
    card, why = placing.find_card(Settings())
    assert card is not None and not why
    assert (card.index, card.device) == (1, torch.device("cuda", 1))
    assert card.gpu == Gpu("NVIDIA GeForce RTX 4090", 24 * GB, 22 * GB)


def test_nobody_who_has_no_gpu_is_told_about_it(cards: Cards) -> None:
    assert placing.find_card(Settings()) == (None, "")
    cards.given([ADA])
    assert placing.find_card(Settings(device="cpu")) == (None, "")
    assert placing.find_card(Settings(vram=0)) == (None, "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cards": [], "driver": ["RTX 4090"], "version": None}, "without CUDA"),
        ({"cards": [], "driver": ["RTX 4090"]}, "driver too old"),
        ({"cards": [ADA], "hip": "7.1"}, "AMD"),
        ({"cards": [TURING]}, "bfloat16"),
        ({"cards": [ADA], "shared": True}, "--vram"),
    ],
)
def test_a_card_that_cannot_be_used_is_a_note_and_an_error_where_it_was_asked_for(
    cards: Cards, given: dict[str, Any], words: str
) -> None:
    cards.given(given.pop("cards"), **given)
    card, why = placing.find_card(Settings())
    assert card is None and words in why
    if words == "--vram":
        asked, _ = placing.find_card(Settings(vram=16 * GB))
        assert asked is not None and asked.shared
        return
    with pytest.raises(UsageError, match="device = cuda") as caught:
        placing.find_card(Settings(device="cuda"))
    assert words in caught.value.message and caught.value.hint


def test_wishes_that_contradict_each_other_are_refused(cards: Cards) -> None:
    with pytest.raises(UsageError, match="there is no GPU"):
        placing.find_card(Settings(device="cuda"))
    cards.given([ADA])
    with pytest.raises(UsageError, match="no memory"):
        placing.find_card(Settings(device="cuda", vram=0))


def test_accelerate_says_what_is_free() -> None:
    """Without a card only the machine's own memory, by the real library."""
    limits = placing.memory_limits()
    assert set(limits) == {"cpu"} and limits["cpu"] > 0


# -- whether it pays -------------------------------------------------------------------------------


def machine(vram: int, config: ModelConfig) -> Plan:
    budget = Budget(ram=64 * GB, vram=vram * GB, disk=1000 * GB, core_flops=180e9)
    return plan(config, PackSizes.estimate(config), budget)


def test_the_real_model_gains_by_any_card_and_a_tiny_one_does_not() -> None:
    for vram in (8, 12, 24):
        assert gains(REAL, machine(vram, REAL), machine(0, REAL))
    tiny = shape_config(5, 512, shape="tiny")
    assert machine(24, tiny).device.head
    assert not gains(tiny, machine(24, tiny), machine(0, tiny))


def test_what_does_not_fit_without_a_gpu_gains_by_it() -> None:
    small = Budget(ram=7 * GB, disk=1000 * GB)
    without = plan(REAL, PackSizes.estimate(REAL), small, context=4096)
    there = plan(
        REAL, PackSizes.estimate(REAL), dataclasses.replace(small, vram=24 * GB), context=4096
    )
    assert there.fits and not without.fits
    assert gains(REAL, there, without) and not gains(REAL, without, there)
