"""calibrate: the rates it finds give the planner the times that were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_local import sizes as counting
from mimo_local.calibrate import PROMPT, TOKENS, Timings, calibrate, solve
from mimo_local.config import ModelConfig
from mimo_local.device import HOST, Devices
from mimo_local.errors import UsageError
from mimo_local.experts.meters import Meters
from mimo_local.hardware import Gpu, Hardware
from mimo_local.plan import Budget, Plan, here, plan
from mimo_local.plan.planner import forecast, rates_of
from mimo_local.plan.prediction import expert_seconds, memory_s
from mimo_local.plan.rates import Calibration
from mimo_local.sizes import GB

REAL = ModelConfig.from_dict(
    json.loads((Path(counting.__file__).with_name("real_config.json")).read_text())
)
FOUND = Calibration(
    when="2026-11-28", tokens=24, prompt=512, resident_s=0.1, expert_s=0.05, wait_s=0.2,
    ram_rate=100e9, rest_rate=50e9, layer_s=1e-3, flops=2e12, disk_rate=5e9, reads=3.5,
)  # fmt: skip


class FakeRunner:
    """A model whose time is made of known rates, on a clock of its own."""

    def __init__(self, made: Plan, *, missed: float = 0.4, disk: float = 3e9) -> None:
        self.model = SimpleNamespace(config=REAL, devices=Devices.all_on(HOST, REAL.n_layers))
        self.vocab_size, self.max_context = 1000, 100_000
        self.meters, self.cache = Meters(), self
        self.time, self.length, self.seen = 0.0, 0, -1
        self.watcher: Any = None
        self.missed, self.made = missed, made
        budget = dataclasses.replace(made.budget, ram_rate=40e9)
        self.rates = dataclasses.replace(rates_of(budget, made.placement), disk=disk)
        self.run_s = expert_seconds(REAL, made.sizes, self.rates, 0, 0)[0]

    def reset(self) -> None:
        self.length = 0

    def truncate(self, n: int) -> None:
        self.length = n

    def prefill(self, ids: list[int]) -> None:
        self.length += len(ids)
        self.meters.wait_s += 1.0
        self.time += 11.0

    def step(self, token: int) -> None:
        import torch

        new = self.length != self.seen
        self.seen = self.length
        self.length += 1
        self.time += 0.2
        self.time += expert_seconds(
            REAL, self.made.sizes, self.rates, 0, self.missed if new else 0.0
        )[0]
        if new and self.missed:
            self.meters.ram_hits += round(376 * (1 - self.missed))
            self.meters.misses += 376 - round(376 * (1 - self.missed))
        if self.watcher is not None:
            for layer in range(1, 48):
                self.watcher(layer, torch.zeros(1, 8, dtype=torch.int32))

    def watch(self, watcher: Any) -> None:
        self.watcher = watcher

    @property
    def host(self) -> FakeRunner:
        return self

    def run(self, layer: int, x: Any, *_: Any) -> Any:
        self.time += self.run_s / 47
        return x

    def clock(self) -> float:
        return self.time


def fresh(missed: float = 0.4) -> tuple[FakeRunner, Plan]:
    made = plan(REAL, None, Budget(ram=64 * GB, disk=500 * GB))
    return FakeRunner(made, missed=missed), made


def run(runner: FakeRunner, made: Plan) -> Calibration:
    return calibrate(runner, runner, made, clock=runner.clock)  # type: ignore[arg-type]


def test_the_rates_that_made_the_times_are_found_again() -> None:
    runner, made = fresh()
    found = run(runner, made)
    assert (found.tokens, found.prompt) == (TOKENS, PROMPT)
    assert found.resident_s == pytest.approx(0.2)
    assert found.ram_rate == pytest.approx(30e9)
    assert found.disk_rate == pytest.approx(3e9, rel=0.02)  # 226 of 376 hits, not 60 %
    assert found.reads == pytest.approx(8 * 0.4 / (1 - 0.6**8), rel=0.01)
    rates = dataclasses.replace(runner.rates, ram=found.ram_rate, rest=found.rest_rate)
    reading = sum(memory_s(REAL, made.sizes, made.placement, rates, PROMPT))
    assert 5 < reading < 9  # 160 GB of experts at 30 GB/s, the rest at what it showed
    assert found.flops == pytest.approx(counting_flops() / (10.0 - reading))


def counting_flops() -> float:
    from mimo_local.plan.prediction import prompt_flops

    return prompt_flops(REAL, PROMPT)


def test_a_plan_with_the_calibration_predicts_the_measured_token() -> None:
    runner, made = fresh()
    found = run(runner, made)
    again = plan(REAL, None, dataclasses.replace(made.budget, calibration=found))
    token = forecast(REAL, again, tokens=PROMPT, depth=PROMPT + 16).decode[0]
    assert token.resident_s == pytest.approx(0.2, rel=1e-3)
    assert token.expert_s == pytest.approx(found.expert_s, rel=1e-3)


@pytest.mark.parametrize(("vram", "resident"), [(24, 0.015), (24, 0.004), (8, 0.1), (8, 0.01)])
def test_what_a_gpu_showed_is_predicted_again(vram: int, resident: float) -> None:
    made = plan(REAL, None, Budget(ram=64 * GB, vram=vram * GB, disk=500 * GB))
    runner = FakeRunner(made)
    timings = Timings(first=[0.3] * 3, again=[0.17 + resident] * 3, experts=[0.17] * 3, depth=520)
    timings.prompt_s = 5.0
    timings.spent.vram_hits, timings.spent.ram_hits = 30, 346
    found = solve(runner, made, timings, 512)  # type: ignore[arg-type]
    assert (found.vram_rate is not None) == (vram == 24)
    assert found.layer_s >= 0 and (found.device_layer_s or 0.0) >= 0
    assert found.flops == rates_of(made.budget, made.placement).cpu_flops
    again = plan(REAL, None, dataclasses.replace(made.budget, calibration=found))
    token = forecast(REAL, again, tokens=512, depth=520).decode[0]
    if (vram, resident) == (8, 0.01):  # less than the GPU's part is assumed to take
        assert token.resident_s < 0.03
    else:
        least = 0.05 * (0.17 + resident)  # experts alone may take longer than within a step
        assert token.resident_s == pytest.approx(max(resident, least), rel=1e-3)
    lines = " ".join(again.assumptions)
    assert lines.count("(calibrated") >= 1
    assert ("TFLOP/s in long prompts (like an RTX 4090), 200 us" in lines) == (vram == 8)


def test_calibrations_of_before_a_gpu_was_measured_still_count(tmp_path: Path) -> None:
    path = here.keep_calibration(tmp_path, "m", "p", FOUND)
    data = json.loads(path.read_text())
    entry = data["calibrations"]["m-p"]
    assert entry.pop("vram_rate") is None and entry.pop("device_layer_s") is None
    path.write_text(json.dumps(data))
    assert here.calibration_of(tmp_path, "m", "p") == FOUND
    there = dataclasses.replace(FOUND, vram_rate=700e9, device_layer_s=0.0)
    here.keep_calibration(tmp_path, "m", "p", there)
    assert here.calibration_of(tmp_path, "m", "p") == there
    entry["vram_rate"] = "fast"
    path.write_text(json.dumps(data))
    assert here.calibration_of(tmp_path, "m", "p") is None


@pytest.mark.parametrize("resident", [0.02, 0.2])
def test_memory_that_is_faster_for_the_rest_leaves_no_negative_overhead(resident: float) -> None:
    runner, made = fresh()
    timings = Timings(first=[0.3] * 3, again=[0.17 + resident] * 3, experts=[0.17] * 3, depth=520)
    timings.prompt_s = 5.0
    found = solve(runner, made, timings, 512)  # type: ignore[arg-type]
    assert found.layer_s >= 0
    again = plan(REAL, None, dataclasses.replace(made.budget, calibration=found))
    token = forecast(REAL, again, tokens=512, depth=520).decode[0]
    assert token.resident_s == pytest.approx(resident, rel=1e-3)


def test_without_misses_the_disk_stays_assumed() -> None:
    runner, made = fresh(missed=0.0)
    found = run(runner, made)
    assert found.disk_rate is None and found.wait_s == 0


def test_a_context_too_short_to_measure_in_is_refused() -> None:
    runner, _ = fresh()
    short = plan(REAL, None, Budget(ram=64 * GB, disk=500 * GB), context=20)
    with pytest.raises(UsageError, match="20 tokens is too short"):
        run(runner, short)


# -- keeping them ----------------------------------------------------------------------------------


def test_a_calibration_is_kept_per_machine_and_pack(tmp_path: Path) -> None:
    data = tmp_path / "not" / "there"
    assert here.calibration_of(data, "m", "p") is None
    here.keep_calibration(data, "m", "p", FOUND)
    other = dataclasses.replace(FOUND, disk_rate=None)
    here.keep_calibration(data, "m", "q", other)
    assert here.calibration_of(data, "m", "p") == FOUND
    assert here.calibration_of(data, "m", "q") == other
    assert here.calibration_of(data, "n", "p") is None
    here.keep_calibration(data, "m", "p", other)
    assert here.calibration_of(data, "m", "p") == other
    assert [p.name for p in data.iterdir()] == [here.FILE], "no temporary file is left"


def test_only_so_many_calibrations_are_kept(tmp_path: Path) -> None:
    for i in range(here.KEPT + 5):
        here.keep_calibration(tmp_path, "m", str(i), FOUND)
    assert here.calibration_of(tmp_path, "m", "4") is None
    assert here.calibration_of(tmp_path, "m", "5") == FOUND


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "calibrations": []}',
     '{"version": 1, "calibrations": {"m-p": 3}}', '{"version": 1, "calibrations": {"m-p": {}}}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / here.FILE).write_text(text)
    assert here.calibration_of(tmp_path, "m", "p") is None
    here.keep_calibration(tmp_path, "m", "p", FOUND)
    assert here.calibration_of(tmp_path, "m", "p") == FOUND


@pytest.mark.parametrize(
    "change", [{"ram_rate": 0}, {"flops": "much"}, {"layer_s": -1}, {"disk_rate": 0}, {"new": 1}]
)
def test_impossible_rates_count_as_none(tmp_path: Path, change: dict[str, object]) -> None:
    path = here.keep_calibration(tmp_path, "m", "p", FOUND)
    data = json.loads(path.read_text())
    data["calibrations"]["m-p"] |= change
    path.write_text(json.dumps(data))
    assert here.calibration_of(tmp_path, "m", "p") is None


def test_a_machine_has_a_key_of_what_makes_its_speed(facts: Hardware) -> None:
    key = here.machine_key(facts)
    assert key == here.machine_key(dataclasses.replace(facts, ram_available=5))
    slower = dataclasses.replace(facts, cores_usable=3)
    with_gpu = dataclasses.replace(facts, gpus=(Gpu("a card", 24 * GB, 23 * GB),))
    assert len({key, here.machine_key(slower), here.machine_key(with_gpu)}) == 3


@pytest.fixture
def facts() -> Hardware:
    from mimo_local import hardware

    return dataclasses.replace(
        hardware.detect(), ram_total=64 * GB, ram_available=40 * GB, gpus=(), kernels="avx512"
    )


def test_what_is_free_now_is_what_may_be_taken(facts: Hardware) -> None:
    whole, free = here.whole_machine(facts), here.free_now(facts, FOUND)
    assert (whole.ram, free.ram) == (64 * GB, 40 * GB)
    assert free.reserve == 8 * GB and free.pack_present and free.calibration == FOUND
    assert whole.core_flops > Budget(ram=0, disk=0).core_flops
    card = dataclasses.replace(facts, gpus=(Gpu("a card", 24 * GB, 23 * GB),))
    assert here.free_now(card).vram == 0 and here.free_now(card, vram=None).vram == 23 * GB


def test_a_model_has_a_key_of_its_manifest(tmp_path: Path) -> None:
    assert here.model_key(tmp_path) == "unknown"
    (tmp_path / "config.json").write_text("{}")
    checkpoint = here.model_key(tmp_path)
    (tmp_path / "pack.json").write_text("{}\n")
    assert len({checkpoint, here.model_key(tmp_path), "unknown"}) == 3
