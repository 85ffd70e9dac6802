"""plan: nothing lost or over budget, more hardware never slower, refusals name the gigabytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local import sizes as counting
from mimo_local.config import ModelConfig
from mimo_local.errors import DiskSpaceError, NotEnoughMemoryError, UsageError
from mimo_local.plan import Budget, Plan, plan
from mimo_local.plan.prediction import expected_layer_s, spilling
from mimo_local.plan.rates import Calibration
from mimo_local.plan.routing import SKEWED, UNIFORM, HitCurve
from mimo_local.sizes import GB, PackSizes, hidden_bytes, kv_bytes
from quant.recipe import Recipe

REAL = ModelConfig.from_dict(
    json.loads((Path(counting.__file__).with_name("real_config.json")).read_text())
)
PACK = PackSizes.estimate(REAL)
budgets = st.builds(
    Budget,
    ram=st.integers(10, 400).map(lambda n: n * GB),
    vram=st.integers(0, 200).map(lambda n: n * GB),
    disk=st.integers(170, 2000).map(lambda n: n * GB),
    cores=st.integers(1, 64),
)


BUFFERS = (
    *("KV cache", "restart points", "activations", "hidden states", "left alone"),
    *("wider scales in VRAM", "ends of RAM slots", "4-bit head for drafts", "pinned buffers"),
)
OTHERS = ("read slots", "copies", "experts passing")


def model_bytes(found: Plan) -> int:
    """Bytes of the pack the plan speaks of: no buffer, no copy."""
    return sum(
        row.nbytes
        for row in found.table
        if row.name not in BUFFERS and not row.name.startswith(OTHERS)
    )


@given(budget=budgets, context=st.integers(1, 262_144))
@settings(max_examples=200, deadline=None)
def test_every_byte_is_placed_once_and_no_tier_is_over_budget(budget: Budget, context: int) -> None:
    found = plan(REAL, PACK, budget, context=context)
    for row in found.table:
        assert row.vram + row.ram + row.disk == row.nbytes, row
        assert min(row.vram, row.ram, row.disk) >= 0
    assert model_bytes(found) == PACK.total
    if found.fits:
        assert sum(row.ram for row in found.table) <= budget.ram
        assert sum(row.vram for row in found.table) <= budget.vram
    assert {row.name: row.nbytes for row in found.table}["KV cache"] == kv_bytes(REAL, context)
    assert found.hidden_budget_bytes <= hidden_bytes(REAL, context)


@given(budget=budgets)
@settings(max_examples=100, deadline=None)
def test_the_tiers_budgets_are_what_the_table_says(budget: Budget) -> None:
    found = plan(REAL, PACK, budget)
    rows = {row.name: row for row in found.table}
    experts = [row for name, row in rows.items() if name.startswith("experts, ")]
    slots = [row for name, row in rows.items() if name.startswith(("read slots", "copies", "ends"))]
    assert found.expert_ram_bytes == sum(row.ram for row in (*experts, *slots))
    wider = rows["wider scales in VRAM"].vram if "wider scales in VRAM" in rows else 0
    assert found.expert_vram_bytes == sum(row.vram for row in experts) + wider
    alone = rows["left alone"]
    assert sum(row.vram for row in found.table) - alone.vram == found.vram_bytes
    assert not found.expert_vram_bytes or found.device.head, "what every token reads comes first"
    assert (found.staging_slots > 0) == any(row.disk for row in experts)
    assert found.staging_slots in (0, 16), "two layers' choices"


@given(
    budget=budgets,
    extra=st.integers(1, 100),
    context=st.sampled_from([512, 8192, 32_768, 262_144]),
)
@settings(max_examples=200, deadline=None)
def test_more_ram_never_makes_a_plan_worse(budget: Budget, extra: int, context: int) -> None:
    more_ram = dataclasses.replace(budget, ram=budget.ram + extra * GB)
    less, more = (plan(REAL, PACK, b, context=context) for b in (budget, more_ram))
    assert more.fits or not less.fits
    if less.prediction and more.prediction:
        for a, b in zip(less.prediction.decode, more.prediction.decode, strict=True):
            assert b.tokens_per_s >= a.tokens_per_s * 0.999_999
            assert b.disk_bytes <= a.disk_bytes
        assert more.prediction.prefill.seconds <= less.prediction.prefill.seconds * 1.000_001


@given(budget=budgets)
@settings(max_examples=100, deadline=None)
def test_uniform_routing_is_the_lower_bound(budget: Budget) -> None:
    found = plan(REAL, PACK, budget).prediction
    if found:
        worst, best = found.decode
        assert (worst.routing, best.routing) == ("uniform", "skewed")
        assert worst.tokens_per_s <= best.tokens_per_s * 1.000_001
        assert worst.hit <= best.hit and worst.disk_bytes >= best.disk_bytes
        assert found.tokens_per_s == (worst.tokens_per_s, best.tokens_per_s)


@pytest.mark.parametrize(
    ("kept", "low", "high"), [(19, 45, 55), (38, 62, 80), (55, 75, 85), (75, 90, 94)]
)
def test_the_skewed_curve_runs_through_what_public_traces_show(
    kept: int, low: int, high: int
) -> None:
    assert low <= 100 * SKEWED(kept / 100) <= high
    assert UNIFORM(kept / 100) == pytest.approx(kept / 100)


@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_a_hit_curve_rises_from_nothing_to_everything(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    assert 0 <= SKEWED(low) <= SKEWED(high) <= 1
    assert SKEWED(low) >= UNIFORM(low) - 1e-12
    assert (SKEWED(0), SKEWED(1), SKEWED(-1), SKEWED(2)) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0.0, 0.0), (0.5, 0.9)),
        ((0.1, 0.0), (1.0, 1.0)),
        ((0.0, 0.0), (0.5, 0.9), (0.5, 0.95), (1.0, 1.0)),
        ((0.0, 0.0), (0.4, 0.9), (0.5, 0.8), (1.0, 1.0)),
        ((0.0, -1.0), (1.0, 1.0)),
        ((0.0, float("nan")), (1.0, 1.0)),
    ],
)
def test_a_curve_that_does_not_rise_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(UsageError, match="my trace"):
        HitCurve("my trace", points)


def test_a_recorded_trace_takes_the_place_of_the_bounds() -> None:
    trace = HitCurve.through("trace of tuesday", {0.5: 0.6, 0.3: 0.65, 0.0: 0.1, 1.0: 0.98})
    assert trace.points == ((0.0, 0.0), (0.3, 0.65), (0.5, 0.65), (1.0, 1.0))
    found = plan(REAL, PACK, Budget(ram=64 * GB, disk=500 * GB), curves=(trace,))
    assert found.prediction is not None
    assert [d.routing for d in found.prediction.decode] == ["trace of tuesday"]
    assert "trace of tuesday" in found.assumptions[-1]


@pytest.mark.parametrize(("vram", "disk"), [(0.0, 0.0), (0.09, 0.58), (0.5, 0.5), (0.0, 1.0)])
def test_the_mean_layer_time_is_what_drawing_experts_gives(vram: float, disk: float) -> None:
    draw = random.Random(7)
    times = (0.02, 0.2, 2.4)
    total, n = 0.0, 20_000
    for _ in range(n):
        v = d = 0
        for _ in range(8):
            x = draw.random()
            v, d = v + (x < vram), d + (vram <= x < vram + disk)
        read = d * times[2] + times[1] if d else 0.0
        total += max(v * times[0], (8 - v) * times[1], read)
    assert expected_layer_s(8, vram, disk, *times) == pytest.approx(total / n, rel=0.02)


def test_a_machine_without_room_is_refused_with_the_missing_gigabytes() -> None:
    found = plan(REAL, PACK, Budget(ram=6 * GB, disk=100 * GB))
    assert not found.fits
    assert found.prediction is None
    assert [p.kind for p in found.problems] == ["memory", "disk"]
    memory, disk = found.problems
    assert f"{(PACK.total - 100 * GB) / GB:.1f} GB missing" in disk.message
    assert "6.0 GB are there" in memory.message
    assert "--attention nf4" in memory.hint and "GPU" in memory.hint
    assert "more RAM" in memory.hint
    with pytest.raises(NotEnoughMemoryError):
        found.check()
    # What was said to be missing is enough, and a gigabyte less is not.
    enough = Budget(ram=6 * GB + memory.missing, disk=PACK.total)
    assert plan(REAL, PACK, enough).fits
    assert not plan(REAL, PACK, dataclasses.replace(enough, ram=enough.ram - 2)).fits
    with pytest.raises(DiskSpaceError):
        plan(REAL, PACK, Budget(ram=64 * GB, disk=100 * GB)).check()


def test_a_pack_that_is_already_there_needs_no_free_disk() -> None:
    budget = Budget(ram=64 * GB, disk=GB, pack_present=True)
    assert plan(REAL, PACK, budget).fits


def test_less_context_is_offered_where_it_would_help() -> None:
    budget = Budget(ram=10 * GB, disk=500 * GB)
    memory = plan(REAL, PACK, budget, context=262_144).problems[0]
    assert "--context 2048" in memory.hint
    assert plan(REAL, PACK, budget).fits
    assert plan(REAL, PACK, budget).context < 32_768


def test_the_context_is_32k_where_it_fits_and_a_longer_one_has_its_price() -> None:
    found = plan(REAL, PACK, Budget(ram=64 * GB, disk=500 * GB))
    assert found.context == 32_768
    (note,) = [note for note in found.notes if "262144" in note]
    assert "5.3 GB more" in note and "tokens/s" in note
    small = plan(REAL, PACK, Budget(ram=14 * GB, disk=500 * GB))
    assert small.fits and "too much here" in " ".join(small.notes)


def test_int8_keys_and_values_leave_room() -> None:
    """Half the bytes: a longer context unasked, more experts, a faster end of a long context."""
    small = Budget(ram=11 * GB, disk=500 * GB)
    short, longer = (plan(REAL, PACK, small, kv_itemsize=n).context for n in (2, 1))
    assert longer == 2 * short
    budget = Budget(ram=64 * GB, disk=1000 * GB)
    wide, narrow = (plan(REAL, PACK, budget, context=262_144, kv_itemsize=n) for n in (2, 1))
    saved = kv_bytes(REAL, 262_144) - kv_bytes(REAL, 262_144, 1)
    sizes = [{row.name: row.ram for row in found.table}["KV cache"] for found in (wide, narrow)]
    assert sizes[0] - sizes[1] == saved and saved / GB == pytest.approx(2.94, abs=0.02)
    more = narrow.placement.ram_experts - wide.placement.ram_experts
    # An eighth of what is left goes to the hidden states of a document.
    assert more == pytest.approx(7 / 8 * saved / PACK.expert, abs=1)
    tight = plan(REAL, PACK, small, context=262_144)
    assert "kv_dtype = int8" in tight.problems[0].hint
    coded = plan(REAL, PACK, small, context=262_144, kv_itemsize=1).problems[0]
    assert "int8" not in coded.hint and coded.missing < tight.problems[0].missing


def test_a_pack_that_fits_into_memory_has_no_disk_tier() -> None:
    found = plan(REAL, PACK, Budget(ram=256 * GB, disk=1000 * GB))
    assert found.prediction is not None and found.staging_slots == 0
    assert found.expert_ram_bytes == PACK.expert * PACK.experts
    worst, best = found.prediction.decode
    assert worst.disk_bytes == best.disk_bytes == worst.wait_s == 0
    assert found.prediction.fill_s == 0 and found.prediction.load_s > 20


def test_experts_in_vram_have_copies_in_ram_where_there_is_room() -> None:
    found = plan(REAL, PACK, Budget(ram=256 * GB, vram=24 * GB, disk=1000 * GB))
    assert found.placement.copies == found.placement.vram_experts > 0
    assert found.expert_ram_bytes == PACK.expert * PACK.experts


def test_a_slot_in_ram_is_as_large_as_the_tier_makes_it() -> None:
    from mimo_local.experts.arena import Arena

    for expert in (4096, 1 << 20, 8 << 20, PACK.expert):
        assert Arena(1, expert).slot_bytes == dataclasses.replace(PACK, expert=expert).ram_slot


def test_an_expert_in_vram_is_wider_than_in_the_pack() -> None:
    assert PACK.vram_slot == 25_165_824 * 9 // 16, "4.5 bits a weight"
    assert PackSizes.estimate(REAL, Recipe.uniform("int8")).vram_slot < 1.001 * 25_198_592


def test_layers_of_wider_experts_are_counted_as_they_are() -> None:
    """Slots are as wide as the widest; what is stored, read and multiplied is not."""
    mixed = PackSizes.estimate(REAL, Recipe(bits=5.0, wide=(1, 2, 3, 4)))
    wide = PackSizes.estimate(REAL, Recipe.uniform("int8"))
    assert mixed.expert == wide.expert and mixed.slot == wide.slot
    assert mixed.total == PACK.total + 4 * 256 * (wide.expert - PACK.expert)
    assert PACK.expert < mixed.mean < wide.expert and PACK.mixed == 0 and PACK.mean == PACK.expert
    for ram in (64, 256):
        budget = Budget(ram=ram * GB, disk=1000 * GB)
        plain, found, widest = (plan(REAL, pack, budget) for pack in (PACK, mixed, wide))
        assert sum(row.ram for row in found.table) <= budget.ram
        assert plain.prediction and found.prediction and widest.prediction
        speeds = [p.prediction.tokens_per_s[0] for p in (plain, found, widest) if p.prediction]
        assert speeds == sorted(speeds, reverse=True)
    # All of them fit where the widest would not.
    assert found.staging_slots == 0 < widest.staging_slots
    assert found.expert_ram_bytes == pytest.approx(mixed.mixed, rel=1e-6)


def test_a_long_document_is_read_in_parts_and_says_so() -> None:
    budget = Budget(ram=64 * GB, disk=500 * GB)
    once, twice = (plan(REAL, PACK, budget, context=32_768, tokens=n) for n in (32_768, 65_536))
    assert once.prediction and twice.prediction
    assert (once.prediction.prefill.parts, twice.prediction.prefill.parts) == (1, 2)
    ratio = twice.prediction.prefill.seconds / once.prediction.prefill.seconds
    assert ratio == pytest.approx(2)
    assert any("in 2 parts" in note for note in twice.notes)
    assert not any("parts" in note for note in once.notes)


def test_hidden_states_spill_on_small_machines_and_that_costs_disk_time() -> None:
    budget = Budget(ram=12 * GB, disk=500 * GB, core_flops=1e15)
    found = plan(REAL, PACK, budget, context=65_536, tokens=65_536)
    roomy = plan(
        REAL, PACK, dataclasses.replace(budget, ram=64 * GB), context=65_536, tokens=65_536
    )
    assert found.fits and found.hidden_budget_bytes < hidden_bytes(REAL, 65_536)
    assert any("spill" in note for note in found.notes)
    assert not any("spill" in note for note in roomy.notes)
    times, spilled = spilling(REAL, found.placement, 65_536)
    assert times > 1 and spilled == 65_536 * 4096 * 4
    assert spilling(REAL, roomy.placement, 65_536) == (1, 0)
    assert found.prediction
    seconds = found.prediction.prefill.limits["disk"]
    on_disk = found.placement.disk_experts * PACK.expert
    assert seconds == pytest.approx((times * on_disk + 2 * 48 * spilled) / (7e9 * 0.8))


@given(budget=budgets, tokens=st.integers(1, 262_144))
@settings(max_examples=60, deadline=None)
def test_a_prompt_is_cut_and_spilled_as_the_reader_will(budget: Budget, tokens: int) -> None:
    from mimo_local.prefill import Room

    found = plan(REAL, PACK, dataclasses.replace(budget, vram=0), context=262_144)
    room = Room.plan(tokens, 4096, 8, found.hidden_budget_bytes)
    times, spilled = spilling(REAL, found.placement, tokens)
    assert (times, spilled > 0) == (room.passes, room.spilled)


def test_the_memory_left_alone_can_be_given() -> None:
    found = plan(REAL, PACK, Budget(ram=64 * GB, disk=500 * GB, reserve=GB))
    assert {row.name: row.nbytes for row in found.table}["left alone"] == GB


CALIBRATED = Calibration(
    when="2026-11-28", tokens=24, prompt=512, resident_s=0.1, expert_s=0.05, wait_s=0.2,
    ram_rate=100e9, rest_rate=50e9, layer_s=1e-3, flops=2e12, disk_rate=5e9, reads=3.5,
)  # fmt: skip


def test_a_calibration_goes_before_every_assumed_rate() -> None:
    budget = Budget(ram=64 * GB, disk=500 * GB, calibration=CALIBRATED)
    found = plan(REAL, PACK, budget)
    assert found.prediction
    text = " ".join(found.assumptions)
    assert text.count("calibrated 2026-11-28") == 3 and "(assumed)" not in text
    assert found.prediction.prefill.limits["arithmetic"] > 0
    resident = found.prediction.decode[0].resident_s
    dense = PACK.attention + PACK.dense + PACK.head + PACK.exact + kv_bytes(REAL, 8192)
    assert resident == pytest.approx(48 * 1e-3 + dense / 50e9)
    unread = dataclasses.replace(CALIBRATED, disk_rate=None)
    lines = plan(REAL, PACK, dataclasses.replace(budget, calibration=unread)).assumptions
    assert "disk 7 GB/s (assumed)" in " ".join(lines)


def test_the_slowest_tier_and_the_context_show_in_the_speed() -> None:
    speeds = []
    for rate, context in itertools.product((3.5e9, 7e9, 12e9), (131_072, 8192)):
        budget = Budget(ram=64 * GB, disk=1000 * GB, disk_rate=rate)
        found = plan(REAL, PACK, budget, context=context).prediction
        assert found
        speeds.append(found.tokens_per_s[0])
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("context", [0, -5, 262_145])
def test_a_context_the_model_does_not_have_is_a_usage_error(context: int) -> None:
    with pytest.raises(UsageError, match=str(context)) as caught:
        plan(REAL, PACK, Budget(ram=64 * GB, disk=1000 * GB), context=context)
    assert "262144" in caught.value.hint


@pytest.mark.parametrize("tokens", [0, -550])
def test_no_document_is_a_usage_error(tokens: int) -> None:
    with pytest.raises(UsageError, match=str(tokens)):
        plan(REAL, PACK, Budget(ram=64 * GB, disk=1000 * GB), tokens=tokens)


def test_a_model_without_experts_and_head_on_a_machine_without_gpu_is_plain_arithmetic() -> None:
    dense = dataclasses.replace(PACK, experts=0, head=0)
    budget = Budget(ram=64 * GB, disk=1000 * GB, cores=4)
    found = plan(REAL, dense, budget)
    assert not any("VRAM" in line or "PCIe" in line for line in found.assumptions)
    assert found.prediction and found.prediction.decode[0].expert_s == 0
    assert not any("likely" in line for line in found.assumptions)


def test_measured_rates_are_called_measured() -> None:
    lines = plan(REAL, PACK, Budget(ram=64 * GB, disk=GB * 500, measured=("ram",))).assumptions
    assert [("measured" in line) for line in lines[:2]] == [True, False]


def test_a_gpu_smaller_than_its_reserve_is_left_alone_and_said() -> None:
    found = plan(REAL, PACK, Budget(ram=64 * GB, vram=2 * GB, disk=500 * GB))
    assert not any(row.vram for row in found.table)
    assert any("it is not used" in note for note in found.notes)


def test_the_plan_is_plain_data() -> None:
    data = json.loads(json.dumps(plan(REAL, None, Budget(ram=64 * GB, disk=500 * GB)).to_dict()))
    assert data["fits"] is True
    assert data["speeds"] == "estimated"
    assert data["total"] == PACK.total
    assert data["expert_ram_bytes"] > 16 * PACK.expert and data["staging_slots"] == 16
    assert data["prediction"]["decode"][1]["routing"] == "skewed"


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys, mimo_local.plan.here, mimo_local.verdicts\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_disk_rests_while_a_prompt_is_at_attention() -> None:
    """Measured on 5 layers of the real shapes: reading and experts overlap, attention adds."""
    budget = Budget(ram=64 * GB, disk=500 * GB)
    slow = plan(REAL, PACK, dataclasses.replace(budget, disk_rate=1e9), tokens=2000)
    quick = plan(REAL, PACK, dataclasses.replace(budget, disk_rate=100e9), tokens=2000)
    for found, bound in ((slow, "disk"), (quick, "arithmetic")):
        assert found.prediction
        reading = found.prediction.prefill
        rest = reading.limits["the rest"]
        assert reading.bound == bound and rest > 0
        assert reading.seconds == pytest.approx(reading.limits[bound] + rest, rel=0.05)
