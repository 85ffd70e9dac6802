"""plan with a GPU: what every token reads goes there first, whole layers, never over its memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import sizes as counting
from mimo_local.cli.plan_text import duration
from mimo_local.config import ModelConfig
from mimo_local.hardware import Gpu, detect
from mimo_local.plan import Budget, here, plan, rates, residents
from mimo_local.plan.cards import CARDS, like, named
from mimo_local.plan.planner import span
from mimo_local.plan.prediction import DEPTH, pass_limits, spilling
from mimo_local.plan.rates import CORE_FLOPS, DEVICE_LAYER_S, STEP_S
from mimo_local.plan.residents import (
    LEAST_ROWS,
    SHARED,
    STAGING,
    STREAMS,
    VRAM_RESERVE,
    hidden_bytes,
)
from mimo_local.plan.routing import UNIFORM, HitCurve
from mimo_local.random_weights import shape_config
from mimo_local.settings import Draft
from mimo_local.sizes import GB, PackSizes, device_bytes, kv_bytes, restart_bytes
from quant.formats import FORMATS
from quant.on_device import nbytes_there
from quant.recipe import Recipe

REAL = ModelConfig.from_dict(
    json.loads((Path(counting.__file__).with_name("real_config.json")).read_text())
)
PACK = PackSizes.estimate(REAL)
RECIPES = (Recipe(), Recipe.uniform("nf4"), Recipe.uniform("int8"), Recipe.for_format("mxfp4"))


def machine(vram: float, ram: float = 64, **more: object) -> Budget:
    numbers = {"vram": int(vram * GB), "ram": int(ram * GB), "disk": 1000 * GB}
    return dataclasses.replace(Budget(**numbers), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_takes_the_bytes_that_are_uploaded(name: str) -> None:
    for rows, cols in ((1, 64), (7, 128), (192, 576), (2048, 4096)):
        expected = nbytes_there(name, rows, cols, torch.device("cuda"))
        assert device_bytes(name, rows, cols) == expected


def test_layers_add_up_to_what_the_pack_has() -> None:
    for recipe in RECIPES:
        pack = PackSizes.estimate(REAL, recipe)
        assert sum(layer.attention for layer in pack.layers) == pack.attention
        assert sum(layer.dense for layer in pack.layers) == pack.dense
        norm_and_mtp = 4 * (4096 + 3 * (5 * 4096 + 64))
        assert sum(layer.exact for layer in pack.layers) == pack.exact - norm_and_mtp
    int8, nf4 = (PackSizes.estimate(REAL, Recipe.uniform(name)) for name in ("int8", "nf4"))
    layer = int8.layers[1]
    assert layer.vram == layer.attention + layer.exact, "8 bits are the same everywhere"
    # 4.25 bits a weight in the pack, 4.5 there.
    there, here = nf4.layers[1].vram_attention, nf4.layers[1].attention
    assert there * 17 == here * 18


@given(
    vram=st.integers(0, 260).map(lambda n: n * GB // 4),
    ram=st.integers(12, 200).map(lambda n: n * GB),
    context=st.sampled_from([512, 8192, 32_768, 262_144]),
    itemsize=st.sampled_from([1, 2, 4]),
    recipe=st.sampled_from(RECIPES),
    drafting=st.sampled_from(["auto", "on", "off"]),
)
@settings(max_examples=150, deadline=None)
def test_residents_come_first_and_nothing_is_over_the_budget(
    vram: int, ram: int, context: int, itemsize: int, recipe: Recipe, drafting: Draft
) -> None:
    pack = PackSizes.estimate(REAL, recipe)
    budget = Budget(ram=ram, vram=vram, disk=1000 * GB)
    found = plan(REAL, pack, budget, context=context, kv_itemsize=itemsize, drafting=drafting)
    there, rows = found.device, {row.name: row for row in found.table}
    if there.layers:
        assert found.vram_bytes + there.reserve <= vram
        assert sum(row.vram for row in found.table) <= vram
    else:
        assert found.vram_bytes == 0 and not any(row.vram for row in found.table)
    assert there.head <= (there.layers == 48) and there.drafter <= there.head
    assert found.placement.vram_experts == 0 or there.head
    assert found.layers_on_device == tuple(i < there.layers for i in range(48))
    # Keys and values are split, not doubled.
    assert rows["KV cache"].nbytes == kv_bytes(REAL, context, itemsize)
    points = restart_bytes(REAL, itemsize)
    assert rows["restart points"].nbytes == points
    assert found.session_bytes == kv_bytes(REAL, context, itemsize) + points
    assert found.session_vram_bytes == rows["KV cache"].vram + rows["restart points"].vram
    if found.fits:
        assert sum(row.ram for row in found.table) <= ram


@given(vram=st.integers(0, 240), more=st.integers(1, 40), ram=st.integers(16, 200))
@settings(max_examples=100, deadline=None)
def test_more_vram_never_makes_answers_slower(vram: int, more: int, ram: int) -> None:
    less, larger = (
        plan(REAL, PACK, machine(v / 4, ram), context=8192, drafting="off")
        for v in (vram, vram + more)
    )
    assert larger.device.layers >= less.device.layers
    assert less.prediction and larger.prediction
    for a, b in zip(less.prediction.decode, larger.prediction.decode, strict=True):
        assert b.tokens_per_s >= a.tokens_per_s * 0.999_999


def test_a_24_gb_card_has_all_but_the_embedding_and_most_experts() -> None:
    found = plan(REAL, PACK, machine(24))
    there = found.device
    assert (there.layers, there.head, there.drafter) == (48, True, True)
    assert set(found.placement.ram) == {"embedding"}
    assert 700 < found.placement.vram_experts < 1000
    assert there.pinned == (STREAMS + STAGING) * PACK.staging_slot + 6 * SHARED * 4096
    assert there.rows == 32_768 and there.hidden == hidden_bytes(REAL, 32_768)
    assert found.hidden_budget_bytes == 0, "nothing of a prompt stays in RAM"
    assert plan(REAL, PACK, machine(24), drafting="off").device.drafter is False


def test_an_8_gb_card_has_whole_layers_from_the_first_on_and_no_expert() -> None:
    found = plan(REAL, PACK, machine(8))
    there = found.device
    assert 25 < there.layers < 48
    assert not there.head and not there.drafter and not found.placement.vram_experts
    first = PACK.layers[: there.layers]
    assert there.attention == sum(layer.attention for layer in first)
    assert found.placement.ram["attention"] == PACK.attention - there.attention
    assert found.hidden_budget_bytes > 0, "the other layers need them in RAM"
    assert any(f"{there.layers} of 48 layers" in note for note in found.notes)
    shorter = plan(REAL, PACK, machine(8), context=4096).device.layers
    assert shorter > there.layers, "a shorter context leaves room for layers"


@pytest.mark.parametrize(
    ("vram", "words"),
    [(2.4, "it is not used"), (3.0, "too few for one layer"), (8.0, "of 48 layers"), (24.0, "")],
)
def test_what_a_gpu_does_not_do_is_said(vram: float, words: str) -> None:
    notes = [note for note in plan(REAL, PACK, machine(vram)).notes if "VRAM" in note]
    assert (words in notes[0]) if words else not notes


def test_a_head_that_is_the_embedding_lies_in_both_places() -> None:
    tied = dataclasses.replace(REAL, tie_embeddings=True)
    pack = PackSizes.estimate(tied)
    assert pack.head == 0 and pack.vram_head == PACK.vram_head > 0
    found = plan(tied, pack, machine(24))
    assert found.device.head and found.placement.ram["embedding"] == pack.embedding
    read = found.prediction
    assert (
        read
        and read.decode[0].resident_s < plan(tied, pack, machine(0)).prediction.decode[0].resident_s
    )  # type: ignore[union-attr]


def test_a_model_without_experts_goes_to_the_gpu_whole() -> None:
    config = shape_config(5, 512, shape="tiny")
    dense = dataclasses.replace(
        config,
        n_experts=0, experts_per_token=0,
        layers=tuple(dataclasses.replace(ly, mlp="dense") for ly in config.layers),
    )  # fmt: skip
    found = plan(dense, PackSizes.estimate(dense), machine(8))
    assert found.device.layers == 5 and found.device.head
    assert found.device.streams == found.device.pinned == 0
    assert found.prediction and found.prediction.prefill.bound == "GPU"


def test_small_experts_take_no_whole_pages_of_vram() -> None:
    config = shape_config(5, 512, shape="tiny")
    pack = PackSizes.estimate(config, Recipe.uniform("int8"))
    assert pack.vram_slot < pack.expert
    found = plan(config, pack, machine(8))
    assert found.placement.vram_experts == pack.experts
    assert all(min(row.vram, row.ram, row.disk) >= 0 for row in found.table)
    assert sum(row.vram for row in found.table) == found.vram_bytes + found.device.reserve


# -- how fast --------------------------------------------------------------------------------------

# Section by section the same machine in an independent cost model, which sampled routings: 4.5 bits
# a weight (14.16 MB an expert), 8k of context, 90 us a layer, no drafting. Its skewed routing:
TOP = HitCurve(
    "top", ((0.0, 0.0), (0.05, 0.22), (0.10, 0.34), (0.20, 0.49), (0.50, 0.75), (1.0, 1.0))
)


@pytest.mark.parametrize(
    ("ram", "rate", "uniform", "skewed", "chunk_4k", "chunk_8k"),
    [
        (64, 80e9, 1.7, 3.1, 230, 459),
        (96, 80e9, 2.5, 4.8, 338, 676),
        (128, 80e9, 4.5, 7.7, 560, 1120),
        (192, 70e9, 9.5, 12.2, 560, 1120),
    ],
)
def test_estimates_agree_with_an_independent_cost_model_for_a_24_gb_card(
    ram: int, rate: float, uniform: float, skewed: float, chunk_4k: float, chunk_8k: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(rates, "DEVICE_LAYER_S", 90e-6)
    pack = dataclasses.replace(PACK, expert=14_155_776, slot=14_155_776)
    budget = machine(24, ram, ram_rate=rate)
    for tokens, speed in ((4096, chunk_4k), (8192, chunk_8k)):
        found = plan(
            REAL, pack, budget, context=8192, tokens=tokens, curves=(UNIFORM, TOP)
        ).prediction
        assert found is not None
        slow, fast = found.tokens_per_s
        assert slow == pytest.approx(uniform, rel=0.15)
        assert fast == pytest.approx(skewed, rel=0.15)
        assert tokens / found.prefill.seconds == pytest.approx(speed, rel=0.15)


def test_a_token_on_the_gpu_reads_everything_but_experts_at_its_memorys_rate() -> None:
    found = plan(REAL, PACK, machine(24, 192))
    assert found.prediction
    weights = PACK.attention + PACK.dense + PACK.exact + PACK.head + kv_bytes(REAL, DEPTH)
    expected = STEP_S + 48 * DEVICE_LAYER_S + weights / (1008e9 * 0.75)
    assert found.prediction.decode[0].resident_s == pytest.approx(expected, rel=1e-3)


def test_a_prompt_is_bound_by_what_is_slowest() -> None:
    bounds = {
        "disk": machine(24, 64, disk_rate=1e9),
        "PCIe": machine(24, 192, pcie_rate=5e9),
        "GPU": machine(24, 192, gpu_flops=1e13),
    }
    for bound, budget in bounds.items():
        found = plan(REAL, PACK, budget, tokens=8192).prediction
        assert found is not None and found.prefill.bound == bound
        assert found.prefill.seconds == pytest.approx(found.prefill.limits[bound], rel=0.1)
        assert "the rest" not in found.prefill.limits


def test_few_rows_are_computed_where_the_experts_lie() -> None:
    budget = machine(24, 192, cores=16, core_flops=180e9)
    few, many = (plan(REAL, PACK, budget, tokens=n) for n in (16, 8192))
    for found, names in ((few, {"disk", "arithmetic", "GPU"}), (many, {"disk", "PCIe", "GPU"})):
        assert found.prediction and set(found.prediction.prefill.limits) == names


def test_layers_that_do_not_fit_add_their_time() -> None:
    """A card with part of the layers: the others take what they take without it."""
    some, none = (plan(REAL, PACK, machine(v), tokens=8192) for v in (8, 0))
    assert some.prediction and none.prediction
    left = 1 - some.device.layers / 48
    a, b = some.prediction.prefill.limits, none.prediction.prefill.limits
    assert a["arithmetic"] == pytest.approx(b["arithmetic"] * left, rel=0.1)
    assert some.prediction.prefill.seconds < none.prediction.prefill.seconds
    there, here = pass_limits(
        REAL, PACK, some.placement, rates.Rates.of(some.budget, gpu=True), 8192
    )
    assert {"disk", "PCIe", "GPU"} == set(there) and {"disk", "arithmetic", "the rest"} == set(here)


def test_a_prompt_longer_than_a_pass_passes_all_experts_again() -> None:
    found = plan(REAL, PACK, machine(24, 192), context=262_144, tokens=262_144)
    rows = found.device.rows
    assert LEAST_ROWS < rows < 262_144
    assert any(f"more than {rows} tokens" in note for note in found.notes)
    one, all_of_it = (
        pass_limits(REAL, PACK, found.placement, rates.Rates.of(found.budget, gpu=True), n)[0]
        for n in (rows, 262_144)
    )
    times = -(-262_144 // rows)
    assert all_of_it["PCIe"] == pytest.approx(times * one["PCIe"], rel=1e-6)


# -- cards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_the_drivers_name(driver: str, card: str | None) -> None:
    found = named(driver)
    assert (found.name if found else None) == card


@pytest.mark.parametrize(
    ("vram", "card"),
    [(6, "RTX 4060"), (8.5, "RTX 4060"), (12.9, "RTX 3060"), (16, "RTX 4080"), (24, "RTX 4090"),
     (25.7, "RTX 4090"), (32, "RTX 5090"), (48, "RTX A6000"), (80, "A100"), (200, "A100")],
)  # fmt: skip
def test_a_size_stands_for_a_usual_card(vram: float, card: str) -> None:
    assert like(int(vram * GB)).name == card


def test_every_card_is_a_usable_machine() -> None:
    for card in CARDS:
        budget = machine(
            card.vram, 128,
            vram_rate=1e9 * card.vram_rate, gpu_flops=1e12 * card.tflops,
            pcie_rate=1e9 * card.pcie_rate, gpu=card.name,
        )  # fmt: skip
        found = plan(REAL, PACK, budget)
        assert found.fits and found.device.layers > 0
        assert any(card.name in line for line in found.assumptions)


def test_the_cards_of_a_machine_are_what_it_is_planned_with(tmp_path: Path) -> None:
    cards = (Gpu("NVIDIA GeForce RTX 3060", 12 * GB, 11 * GB), Gpu("Matrox G200", 4 * GB, 4 * GB))
    facts = dataclasses.replace(detect(tmp_path), gpus=cards, ram_available=64 * GB)
    whole, free = here.whole_machine(facts), here.free_now(facts, vram=None)
    assert (whole.vram, free.vram) == (12 * GB, 11 * GB)
    assert whole.vram_rate == free.vram_rate == 360e9 and "gpu" in whole.measured
    # Free memory has neither a desktop nor another program in it.
    assert free.vram_reserve is not None and free.vram_reserve < VRAM_RESERVE
    assert here.free_now(facts, vram=8 * GB).vram == 8 * GB
    assert here.free_now(facts).vram == 0
    unknown = dataclasses.replace(facts, gpus=(Gpu("Some other card", 16 * GB, 15 * GB),))
    assert here.whole_machine(unknown).gpu == "RTX 4080"
    assert not here.whole_machine(unknown).measured
    assert here.whole_machine(dataclasses.replace(facts, gpus=())).vram == 0


# -- the buffers that others make ------------------------------------------------------------------


def test_buffers_are_counted_as_they_are_made() -> None:
    from mimo_local import device_attention, prefill
    from mimo_local.experts import device_sweep, shares, vram
    from quant import on_device

    assert residents.STREAMS == device_sweep.SLOTS and residents.STAGING == vram.STAGING
    assert prefill.How().device_chunk == residents.CHUNK
    assert residents.LEAST_ROWS == prefill.LEAST_ROWS
    assert residents.BLOCK == device_attention._BLOCK
    assert residents.UNPACKED == on_device._UNPACKED
    assert residents.SWEPT == device_sweep.ROWS and residents.SHARED == shares.MOST_PAIRS


@given(vram=st.integers(4, 40), tokens=st.integers(1, 262_144), context=st.integers(1024, 262_144))
@settings(max_examples=60, deadline=None)
def test_a_prompt_passes_as_often_as_the_reader_will(vram: int, tokens: int, context: int) -> None:
    from mimo_local.prefill import Room

    found = plan(REAL, PACK, machine(vram), context=context)
    if not found.device.layers or tokens > context:
        return
    room = Room(1, False)
    if found.device.layers < 48:
        room = Room.plan(tokens, 4096, 8, found.hidden_budget_bytes)
    room = room.on_device(tokens, 4096, 8, found.device.hidden)
    assert spilling(REAL, found.placement, tokens) == (room.passes, room.spilled * tokens * 16384)


def test_a_sweeps_own_memory_is_part_of_what_is_kept_free() -> None:
    from mimo_local.experts.device_sweep import DeviceSweep

    sweep = DeviceSweep(
        None, None, "meta",  # type: ignore[arg-type]
        n_experts=256, hidden=4096, width=2048, nbytes=PACK.expert,
    )  # fmt: skip
    found = plan(REAL, PACK, machine(24)).device
    assert sweep.uploader.nbytes <= found.streams
    assert sweep.nbytes - sweep.uploader.nbytes + 6 * SHARED * 4096 <= found.work
    sweep.close()


# -- what the documentation says -------------------------------------------------------------------

GUIDE = Path(__file__).parent.parent / "docs" / "gpu.md"
MACHINES = (
    *((0, 64), (0, 192), (8, 32), (8, 64), (12, 64), (16, 64)),
    *((24, 64), (24, 96), (24, 128), (24, 192), (32, 192), (48, 256)),
)
"""(VRAM, RAM) in GB."""


def expectations() -> str:
    head = ("card", "RAM", "in VRAM", "tokens/s", "100 pages read in")
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for vram, ram in MACHINES:
        budget = machine(0, ram, cores=8, core_flops=CORE_FLOPS["avx512"])
        budget = here.with_gpu(budget, vram * GB) if vram else budget
        found = plan(REAL, PACK, budget)
        there, experts = found.device, found.placement.vram_experts
        held = f"{there.layers} of 48 layers" if there.layers else "-"
        held = f"all layers, head{', drafter' * there.drafter}" if there.head else held
        held += f", {100 * experts / PACK.experts:.0f} % of experts" if experts else ""
        assert found.prediction
        card = f"{vram} GB (as an {budget.gpu})" if vram else "none"
        speeds = span(found.prediction.tokens_per_s), duration(found.prediction.prefill.seconds)
        lines.append(" | ".join((card, f"{ram} GB", held, *speeds)))
    return "\n".join(f"| {line} |" for line in lines)


def test_the_guide_says_what_the_planner_says(request: pytest.FixtureRequest) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split("<!-- table -->\n")
    table, after = rest.split("<!-- end -->")
    if request.config.getoption("--update-golden"):
        new = f"{before}<!-- table -->\n{expectations()}\n<!-- end -->{after}"
        GUIDE.write_text(new, encoding="utf-8")
        return
    assert table.strip() == expectations(), "run `pytest --update-golden` and read the diff"
