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

from mimo_local import plan as planning
from mimo_local.config import ModelConfig
from mimo_local.errors import DiskSpaceError, NotEnoughMemoryError, UsageError
from mimo_local.plan import Budget, plan
from mimo_local.sizes import GB, PackSizes, kv_bytes

REAL = ModelConfig.from_dict(
    json.loads((Path(planning.__file__).with_name("real_config.json")).read_text())
)
PACK = PackSizes.estimate(REAL)
budgets = st.builds(
    Budget,
    ram=st.integers(10, 400).map(lambda n: n * GB),
    vram=st.integers(0, 200).map(lambda n: n * GB),
    disk=st.integers(170, 2000).map(lambda n: n * GB),
    cores=st.integers(1, 64),
)


@given(budget=budgets, context=st.integers(1, 262_144))
@settings(max_examples=150, deadline=None)
def test_every_byte_is_placed_once_and_no_tier_is_over_budget(budget: Budget, context: int) -> None:
    found = plan(REAL, PACK, budget, context=context)
    for row in found.rows():
        assert row.vram + row.ram + row.disk == row.nbytes, row
        assert min(row.vram, row.ram, row.disk) >= 0
    model = sum(
        row.nbytes
        for row in found.rows()
        if row.name not in ("KV cache", "activations", "left to the system", "disk read buffers")
    )
    assert model == PACK.total
    if found.fits:
        assert sum(row.ram for row in found.rows()) <= budget.ram
        assert sum(row.vram for row in found.rows()) <= budget.vram
    assert {row.name: row.nbytes for row in found.rows()}["KV cache"] == kv_bytes(REAL, context)


@given(budget=budgets, extra=st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_more_ram_never_makes_a_plan_worse(budget: Budget, extra: int) -> None:
    less = plan(REAL, PACK, budget)
    more = plan(REAL, PACK, dataclasses.replace(budget, ram=budget.ram + extra * GB))
    assert more.fits or not less.fits
    assert more.today_missing <= less.today_missing
    if less.prediction and more.prediction:
        # The drafter moving from disk to RAM may take the room of a few experts: not a loss to see.
        assert more.prediction.decode_tokens_per_s >= 0.97 * less.prediction.decode_tokens_per_s


@pytest.mark.parametrize(
    ("ram", "rate", "decode", "prefill"),
    [(64, 80e9, 1.7, 230), (96, 80e9, 2.5, 338), (128, 80e9, 4.5, 560), (192, 70e9, 9.5, 560)],
)
def test_estimates_agree_with_an_independent_cost_model_for_a_24_gb_card(
    ram: int, rate: float, decode: float, prefill: float
) -> None:
    # That model sampled routings; 4.5 bits per expert weight (14.16 MB), 8k context, no drafting.
    pack = dataclasses.replace(PACK, expert=14_155_776)
    budget = Budget(ram=ram * GB, vram=24 * GB, disk=1000 * GB, ram_rate=rate)
    found = plan(REAL, pack, budget).prediction
    assert found is not None
    assert found.decode_tokens_per_s == pytest.approx(decode, rel=0.06)
    assert found.prefill_tokens_per_s == pytest.approx(prefill, rel=0.06)


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
        total += max(v * times[0], (8 - v) * times[1], d * times[2])
    assert planning.expected_layer_s(8, vram, disk, *times) == pytest.approx(total / n, rel=0.02)


def test_a_machine_without_room_is_refused_with_the_missing_gigabytes() -> None:
    found = plan(REAL, PACK, Budget(ram=6 * GB, disk=100 * GB))
    assert not found.fits
    assert found.prediction is None and found.today is None
    assert [p.kind for p in found.problems] == ["memory", "disk"]
    memory, disk = found.problems
    assert f"{(PACK.total - 100 * GB) / GB:.1f} GB missing" in disk.message
    assert "6.0 GB are there" in memory.message
    assert "--attention nf4" in memory.hint and "GPU" in memory.hint
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


@pytest.mark.parametrize(("ram", "runs"), [(64, False), (128, False), (192, True), (256, True)])
def test_what_this_version_runs_is_told_apart_from_what_is_planned(ram: int, runs: bool) -> None:
    found = plan(REAL, PACK, Budget(ram=ram * GB, vram=24 * GB, disk=1000 * GB))
    assert found.fits
    assert (found.today_missing == 0) is runs
    assert (found.today is not None) is runs
    for row in found.rows():
        assert not (row.today and (row.vram or row.disk)), "VRAM and disk tiers are planned only"
    if runs:
        assert found.prediction and found.today
        assert found.today.decode_tokens_per_s < found.prediction.decode_tokens_per_s


def test_the_slowest_tier_and_the_context_show_in_the_speed() -> None:
    speeds = []
    for rate, context in itertools.product((3.5e9, 7e9, 12e9), (131_072, 8192)):
        budget = Budget(ram=64 * GB, disk=1000 * GB, disk_rate=rate)
        found = plan(REAL, PACK, budget, context=context).prediction
        assert found
        speeds.append(found.decode_tokens_per_s)
    assert speeds == sorted(speeds)


@pytest.mark.parametrize("context", [0, -5, 262_145])
def test_a_context_the_model_does_not_have_is_a_usage_error(context: int) -> None:
    with pytest.raises(UsageError, match=str(context)) as caught:
        plan(REAL, PACK, Budget(ram=64 * GB, disk=1000 * GB), context=context)
    assert "262144" in caught.value.hint


def test_a_model_without_experts_and_head_on_a_machine_without_gpu_is_plain_arithmetic() -> None:
    dense = dataclasses.replace(PACK, experts=0, head=0)
    budget = Budget(ram=64 * GB, disk=1000 * GB, cores=4)
    found = plan(REAL, dense, budget)
    assert found.prediction == found.today
    assert not any("VRAM" in line or "PCIe" in line for line in found.assumptions)


def test_measured_rates_are_called_measured() -> None:
    lines = plan(REAL, PACK, Budget(ram=64 * GB, disk=GB * 500, measured=("ram",))).assumptions
    assert [("measured" in line) for line in lines[:2]] == [True, False]


def test_a_gpu_smaller_than_its_reserve_is_left_alone_and_said() -> None:
    found = plan(REAL, PACK, Budget(ram=64 * GB, vram=2 * GB, disk=500 * GB))
    assert not any(row.vram for row in found.rows())
    assert any("GPU is not used" in note for note in found.notes)


def test_the_plan_is_plain_data() -> None:
    data = json.loads(json.dumps(plan(REAL, None, Budget(ram=64 * GB, disk=500 * GB)).to_dict()))
    assert data["fits"] is True
    assert data["speeds"] == "estimated"
    assert data["total"] == PACK.total


def test_planning_loads_no_torch() -> None:
    code = "import sys, mimo_local.plan; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
