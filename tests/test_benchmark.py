"""benchmark: what is run is what is counted; names and columns are llama-bench's."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mimo_local import benchmark, hardware
from mimo_local.benchmark import Result, Test
from mimo_local.cli import tables
from mimo_local.errors import CancelledError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.meters import Meters


class FakeRunner:
    """Sleeps a known time per id and writes down what it was asked."""

    vocab_size = 100
    max_context = 4096

    def __init__(self, prefill_s: float = 0.0, step_s: float = 0.0) -> None:
        self.prefill_s, self.step_s = prefill_s, step_s
        self.calls: list[tuple[str, object]] = []
        self.used = 8
        self.counted: Meters | None = None

    def reset(self) -> None:
        self.calls.append(("reset", None))

    def prefill(self, ids: Sequence[int]) -> None:
        self.calls.append(("prefill", tuple(ids)))
        time.sleep(self.prefill_s * len(ids))

    def step(self, token: int) -> None:
        self.calls.append(("step", token))
        time.sleep(self.step_s)
        if self.counted is not None:
            self.counted.ram_hits += 3
            self.counted.misses += 1
            self.counted.disk_bytes += 10_000_000
            self.counted.wait_s += 0.5

    def set_threads(self, n: int) -> None:
        self.calls.append(("threads", n))
        self.used = n

    def meters(self) -> Meters | None:
        return None if self.counted is None else self.counted.copy()

    def threads(self) -> int:
        return self.used


def test_tests_have_llama_bench_names() -> None:
    tests = benchmark.plan_tests([128, 512], [32], [0, 2048])
    assert [test.name for test in tests] == [
        "pp128", "pp512", "tg32", "pp128 @ d2048", "pp512 @ d2048", "tg32 @ d2048",
    ]  # fmt: skip
    assert [test.name for test in benchmark.plan_tests([0], [8])] == ["tg8"]
    with pytest.raises(UsageError):
        benchmark.plan_tests([0], [0])


def test_a_run_is_warmed_up_repeated_and_counted_per_thread_count() -> None:
    runner, seen = FakeRunner(), list[Progress]()
    tests = benchmark.plan_tests([4], [3], [2])
    results = benchmark.run(runner, tests, threads=(1, 2), reps=2, on_progress=seen.append)
    assert [(r.test.name, r.threads, len(r.samples)) for r in results] == [
        ("pp4 @ d2", 1, 2), ("tg3 @ d2", 1, 2), ("pp4 @ d2", 2, 2), ("tg3 @ d2", 2, 2),
    ]  # fmt: skip
    assert [n for call, n in runner.calls if call == "threads"] == [1, 2]
    assert sum(call == "reset" for call, _ in runner.calls) == 4 * (1 + 2)
    assert (seen[-1].done, seen[-1].total) == (12, 12)
    prompts = {ids for call, ids in runner.calls if call == "prefill"}
    assert {len(ids) for ids in prompts} == {2, 4}, "depth and prompt"  # type: ignore[arg-type]
    assert len(prompts) == 2, "the same ids in every repetition"


def test_rates_are_tokens_over_seconds_without_the_depth() -> None:
    runner = FakeRunner(prefill_s=0.001, step_s=0.01)
    assert 10 < benchmark.measure(runner, Test("tg", 5, depth=50)) <= 100
    assert 100 < benchmark.measure(runner, Test("pp", 50, depth=50)) <= 1000


def test_without_thread_counts_the_model_runs_as_it_was_loaded() -> None:
    runner = FakeRunner()
    (result,) = benchmark.run(runner, [Test("tg", 2)], reps=1)
    assert result.threads == 8
    assert not any(call == "threads" for call, _ in runner.calls)


def test_with_tiers_the_table_says_where_the_experts_came_from() -> None:
    runner = FakeRunner()
    runner.counted = Meters(ram_hits=100)  # from loading
    results = benchmark.run(runner, [Test("tg", 4), Test("pp", 8)], reps=2)
    counted = results[0].experts
    assert counted is not None
    assert (counted.ram_hits, counted.misses) == (2 * 4 * 3, 2 * 4)  # the warm-up left out
    assert results[0].disk_bytes_per_token == 10_000_000
    assert results[0].to_dict()["experts"]["wait_s"] == 4.0
    lines = tables.bench(results).splitlines()
    head, _, decode, prompt = ([cell.strip() for cell in line.split("|")[4:9]] for line in lines)
    assert head == ["VRAM", "RAM", "ahead", "disk", "from disk/token"]
    assert decode == ["0%", "75%", "0%", "25%", "10.0 MB"]
    assert prompt == ["", "", "", "", "0.0 MB"]


def test_mean_and_sd() -> None:
    result = Result(Test("tg", 8), 2, (1.0, 2.0, 4.0))
    assert result.mean == pytest.approx(7 / 3)
    assert result.sd == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]))
    assert Result(Test("tg", 8), 2, (5.0,)).sd == 0.0


def test_what_cannot_be_run_is_refused_before_anything_runs() -> None:
    runner = FakeRunner()
    with pytest.raises(UsageError, match="pp4000 @ d97"):
        benchmark.run(runner, [Test("pp", 4000, 97)], threads=(1,))
    with pytest.raises(UsageError, match="0 repetitions"):
        benchmark.run(runner, [Test("pp", 4)], threads=(1,), reps=0)
    with pytest.raises(CancelledError):
        benchmark.run(runner, [Test("pp", 4)], threads=(1,), cancel=lambda: True)
    assert not any(call in ("prefill", "step") for call, _ in runner.calls)


def test_the_document_holds_machine_memory_and_results(tmp_path: Path) -> None:
    results = [Result(Test("pp", 128), 2, (10.0, 12.0))]
    facts = hardware.detect(tmp_path)
    text = json.dumps(benchmark.document(results, hardware=facts, model="x", load_s=1.25))
    data = json.loads(text)
    assert data["results"][0]["test"] == "pp128"
    assert data["results"][0]["tokens_per_s"] == 11.0
    assert data["machine"]["cores_physical"] == facts.cores_physical
    assert data["peak_rss_bytes"] > 1 << 20
    assert str(tmp_path) not in text, "no path of the machine in a figure that is passed around"
