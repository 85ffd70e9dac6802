"""runs and verdicts: what an answer took is kept, bounded, and judged by what was predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_local import runs
from mimo_local.config import ModelConfig
from mimo_local.events import Stats
from mimo_local.experts.meters import Meters
from mimo_local.plan import Budget, plan
from mimo_local.runs import Cost, Predicted, Recorder, Run
from mimo_local.sizes import GB
from mimo_local.verdicts import judge

REAL = ModelConfig.from_dict(
    json.loads((Path(runs.__file__).with_name("real_config.json")).read_text())
)
WORST = Predicted(2.0, 0.4, 2e9, 0.1, 0.1, 0.3)
BEST = Predicted(4.0, 0.7, 1e9, 0.1, 0.1, 0.05)
RUN = Run(
    at="2026-11-28T12:00:00+00:00", machine="m", model="real", pack="p", kernel="avx2",
    calibrated=True,
    prefill=Cost(1000, 10.0, disk_bytes=80 * GB, wait_s=1.0),
    decode=Cost(100, 33.0, wanted=37_600, missed=16_900, disk_bytes=150 * GB, wait_s=13.0),
    predicted=(WORST, BEST), predicted_prefill_s=9.0, bound="arithmetic",
    peak_rss=50 * GB, planned_ram=60 * GB,
)  # fmt: skip


def decoding(**changes: object) -> Run:
    return dataclasses.replace(RUN, decode=dataclasses.replace(RUN.decode, **changes))  # type: ignore[arg-type]


class Clockwork:
    """Meters that move on by a known amount."""

    def __init__(self) -> None:
        self.now = Meters()

    def __call__(self) -> Meters:
        return self.now.copy()

    def work(self, **counted: float) -> None:
        for name, value in counted.items():
            setattr(self.now, name, getattr(self.now, name) + value)


def recorder(folder: Path, meters: Clockwork, budget: Budget | None = None) -> Recorder:
    made = plan(REAL, None, budget or Budget(ram=64 * GB, disk=500 * GB))
    return Recorder(
        folder, config=REAL, plan=made, meters=meters, machine="m", model="real", pack="p"
    )


def answer(found: Recorder, meters: Clockwork, **stats: float) -> None:
    meters.work(misses=5, wait_s=1.0)  # of somebody else, before
    found.begin()
    meters.work(disk_bytes=90 * GB, sweep_bytes=90 * GB, wait_s=2.0)
    found.first_token()
    meters.work(ram_hits=300, staged_hits=20, misses=80, disk_bytes=GB, wait_s=0.5)
    whole = {"prompt_tokens": 600, "cached_tokens": 88, "completion_tokens": 11}
    found.end(Stats(**(whole | {"prefill_s": 30.0, "decode_s": 5.0} | stats)))  # type: ignore[arg-type]


def test_an_answer_is_kept_with_what_had_been_predicted_for_it(tmp_path: Path) -> None:
    meters = Clockwork()
    answer(recorder(tmp_path / "data", meters), meters, kernel="avx2")  # type: ignore[arg-type]
    (run,) = runs.recent(tmp_path / "data", 10)
    assert run.prefill == Cost(512, 30.0, 0, 0, 90 * GB, 2.0)
    assert run.decode == Cost(10, 5.0, 400, 100, GB, 0.5)
    assert run.decode.hit == 0.75 and run.decode.tokens_per_s == 2.0
    assert run.prefill.hit is None, "nobody asked for single experts"
    assert run.kernel == "avx2" and not run.calibrated
    assert [way.hit for way in run.predicted] == sorted(way.hit for way in run.predicted)
    assert run.planned_ram < 64 * GB and run.peak_rss > 1 << 20
    text = (tmp_path / "data" / runs.FILE).read_text()
    assert str(tmp_path) not in text and text.endswith("}\n") and text.count("\n") == 1


def test_an_answer_without_tokens_and_a_folder_that_cannot_be_written_leave_nothing(
    tmp_path: Path,
) -> None:
    meters = Clockwork()
    answer(recorder(tmp_path, meters), meters, completion_tokens=0)
    assert not (tmp_path / runs.FILE).exists()
    (tmp_path / "file").write_text("in the way")
    answer(recorder(tmp_path / "file", meters), meters)
    assert runs.recent(tmp_path / "file", 5) == []


def test_the_file_stays_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / runs.FILE
    for i in range(900):
        runs.append(path, dataclasses.replace(RUN, planned_ram=i))
    assert path.stat().st_size <= runs.LIMIT
    kept = [run.planned_ram for run in runs.recent(tmp_path, 10_000)]
    assert kept == list(range(kept[0], 900)) and len(kept) > 100
    assert [run.planned_ram for run in runs.recent(tmp_path, 2)] == [898, 899]
    assert runs.recent(tmp_path, 0) == []
    assert [p.name for p in tmp_path.iterdir()] == [runs.FILE]


@pytest.mark.parametrize(
    "line",
    [
        "", "not json", "[]", "{}", '{"v":1}', '{"v":99}', "\x00\xff", "null", "3",
    ],
)  # fmt: skip
def test_damaged_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / runs.FILE
    runs.append(path, RUN)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    runs.append(path, RUN)
    assert runs.recent(tmp_path, 10) == [RUN, RUN]


@pytest.mark.parametrize(
    ("key", "value"),
    [("peak_rss", "much"), ("predicted", []), ("prefill", {"tokens": 1}), ("machine", 7),
     ("predicted_prefill_s", -1), ("predicted", [{"hit": 1}]), ("extra", 1)],
)  # fmt: skip
def test_a_line_with_the_wrong_content_is_passed_over(
    tmp_path: Path, key: str, value: object
) -> None:
    path = tmp_path / runs.FILE
    runs.append(path, RUN)
    data = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(data) + "\n")
    assert runs.recent(tmp_path, 10) == []


@given(speed=st.floats(0.01, 1000))
def test_between_the_bounds_a_prediction_was_right(speed: float) -> None:
    found = judge(decoding(seconds=100 / speed))[0]
    assert (found.ratio == 1) == (2.0 <= found.measured <= 4.0)
    assert found.off == (not 2.0 / 1.5 <= found.measured <= 4.0 * 1.5)
    assert bool(found.blame) == found.off
    assert found.what in found.sentence()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seconds": 100.0, "missed": 30_000}, "20% of the experts were in memory, 40-70% exp"),
        ({"seconds": 100.0, "wait_s": 80.0}, "for the disk took 800 ms a token, 300 expected"),
        ({"seconds": 100.0, "wait_s": 30.0}, "computing took 700 ms a token, 200 expected"),
        ({"seconds": 10.0, "missed": 2000}, "95% of the experts were in memory, 40-70% expected"),
        ({"seconds": 15.0, "wait_s": 0.0, "missed": 11_280}, "the memory"),
        ({"seconds": 100.0, "wanted": 0, "missed": 0, "wait_s": 0.0}, "computing took"),
    ],
)  # fmt: skip
def test_the_assumption_that_was_wrong_is_named(changes: dict[str, float], words: str) -> None:
    found = judge(decoding(**changes))[0]
    assert found.off and words in found.blame
    assert "calibrate" not in found.blame
    run = dataclasses.replace(decoding(**changes), calibrated=False)
    assert "mimo plan --calibrate" in judge(run)[0].blame


def test_prompts_are_judged_by_their_own_prediction() -> None:
    found = judge(RUN)
    assert [f.what for f in found] == ["decode", "prefill"]
    assert found[1].ratio == pytest.approx(0.9) and not found[1].off
    slow = dataclasses.replace(RUN, predicted_prefill_s=4.0)
    assert "products were slower" in judge(slow)[1].sentence()
    waiting = dataclasses.replace(slow, prefill=dataclasses.replace(RUN.prefill, wait_s=8.0))
    assert "the disk gave 80.0 GB at 8.00 GB/s" in judge(waiting)[1].sentence()
    fast = dataclasses.replace(RUN, predicted_prefill_s=40.0, bound="disk")
    assert "less had to come from disk" in judge(fast)[1].sentence()
    assert "2.2 times slower" not in judge(fast)[1].sentence()


@pytest.mark.parametrize(
    "run",
    [
        dataclasses.replace(RUN, prefill=Cost(10, 10.0), decode=Cost(3, 10.0)),
        dataclasses.replace(RUN, prefill=Cost(1000, 0.001), decode=Cost(100, 0.001)),
        dataclasses.replace(RUN, prefill=Cost(0, 0.0), decode=Cost(0, 0.0)),
    ],
)
def test_too_little_says_nothing(run: Run) -> None:
    assert judge(run) == ()


# -- a loaded pack ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    from quant.convert import convert

    folder = tmp_path_factory.mktemp("runs")
    d = tiny.config("fs", "mm", experts=32, top_k=2, hidden=64, moe_intermediate=64)
    source = tiny.write(folder / "source", d)
    convert(source, folder / "pack")
    return folder / "pack"


def test_a_pack_is_loaded_as_planned_and_its_answers_are_recorded(
    pack: Path, user_home: Path
) -> None:
    from mimo_local.engine import Engine
    from mimo_local.experts.tiered import TieredStore
    from mimo_local.loading import load
    from mimo_local.sampler import SamplingParams
    from mimo_local.settings import Settings

    whole = load(Settings(model=pack, context=64))
    assert whole.plan is not None and whole.plan.fits and whole.plan.staging_slots == 0
    sizes = whole.plan.sizes
    spared = whole.plan.spare_bytes
    limit = sizes.resident + spared + 24 * sizes.expert
    found = load(Settings(model=pack, context=64, ram=limit))
    assert found.plan is not None and found.plan.staging_slots == 4
    assert found.context_limit == found.plan.context == 64
    store = found.model.experts
    assert isinstance(store, TieredStore)
    # The tier's slots are as many as planned, give or take what rounding leaves.
    assert abs(store.ram.budget - found.plan.expert_ram_bytes) <= 2 * sizes.expert
    store.close()
    with Engine.load(Settings(model=pack, context=64, ram=limit)) as engine:
        params = SamplingParams(temperature=0, max_tokens=12)
        for _ in engine.submit(engine.new_session(), list(range(20)), params):
            pass
    (run,) = runs.recent(user_home / "data", 10)
    assert run.model == "pack" and run.prefill.tokens == 20
    assert run.decode.disk_bytes > 0 and run.decode.wanted > 0
    assert run.predicted[0].disk_bytes > 0


def test_a_checkpoint_is_neither_planned_nor_recorded(pack: Path, user_home: Path) -> None:
    from mimo_local.loading import load
    from mimo_local.settings import Settings

    found = load(Settings(model=pack.with_name("source"), context=64))
    assert found.plan is None and found.recorder is None
    assert not (user_home / "data").exists()


def test_calibrating_a_real_loop_with_a_disk_tier(pack: Path) -> None:
    from mimo_local.benchmark import ModelRunner
    from mimo_local.calibrate import calibrate
    from mimo_local.loading import load
    from mimo_local.settings import Settings

    whole = load(Settings(model=pack, context=128))
    assert whole.plan is not None
    limit = whole.plan.sizes.resident + whole.plan.spare_bytes + 24 * whole.plan.sizes.expert
    loaded = load(Settings(model=pack, context=128, ram=limit))
    assert loaded.plan is not None
    runner = ModelRunner(loaded.model, loaded.new_cache)
    found = calibrate(runner, loaded.model.experts, loaded.plan, tokens=8, prompt=32)
    assert found.tokens == 8 and found.prompt == 32
    assert min(found.ram_rate, found.rest_rate, found.flops, found.resident_s) > 0
    assert found.wait_s >= 0 and found.reads >= 0
    loaded.model.experts.close()
