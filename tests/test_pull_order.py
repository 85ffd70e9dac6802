"""What comes when: the real model's files fit in 8 GB beside the pack, whatever their order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_local.pull.order import HELD, Order, Step, arrange, seconds

GB = 10**9


def real_table() -> tuple[list[Step], dict[str, int]]:
    """The hub's files of MiMo-V2-Flash with their sizes, and the pack's files made of them."""
    sizes = {"model_embedding": 152576 * 4096 * 2, "model_final": 152576 * 4096 * 2}
    sizes["model_mtp"] = 1_189_405_960
    steps = [Step("model", frozenset({"model_embedding", "model_final"}), 2 * 152576 * 4096)]
    for layer in range(48):
        full = layer in (0, 5, 11, 17, 23, 29, 35, 41, 47)
        kv = 1280 if full else 2560
        sizes[f"model_{layer}"] = (12288 + kv) * 4096 + 4096 * 8192 * 2
        if layer == 0:
            sizes["model_0"] += 3 * 16384 * 4096
        else:
            sizes[f"model_{layer}"] += 256 * 4096 * 4
        steps.append(Step(f"layer-{layer:03}", frozenset({f"model_{layer}"}), 10**8))
        if layer:
            one = 2048 * 4096
            sizes[f"model_{layer}_linear_fc1"] = 512 * (one + one // 16384 * 4)
            sizes[f"model_{layer}_linear_fc2"] = 256 * (one + one // 16384 * 4)
            files = frozenset({f"model_{layer}_linear_fc1", f"model_{layer}_linear_fc2"})
            steps.append(Step(f"experts-{layer:03}", files, 768 * one))
    steps.append(Step("mtp", frozenset({"model_mtp"}), 10**9))
    return steps, sizes


def held(order: Order, sizes: dict[str, int], budget: int) -> int:
    """Most bytes on the disk when fetching goes ahead as far as the budget lets it."""
    uses = {file: sum(file in step.needs for step in order.steps) for file in order.files}
    position, freed, peak = 0, 0, 0
    ends, at = {}, 0
    for file in order.files:
        at += sizes[file]
        ends[file] = at
    for step in order.steps:
        wanted = max(ends[file] for file in step.needs)
        assert wanted - freed <= budget, "the step would wait for ever"
        position = max(position, min(at, freed + budget))
        peak = max(peak, position - freed)
        for file in step.needs:
            uses[file] -= 1
            freed += 0 if uses[file] else sizes[file]
    assert freed == at
    return peak


def test_the_real_model_needs_at_most_8_gb_beside_the_pack() -> None:
    steps, sizes = real_table()
    assert 312 * GB < sum(sizes.values()) < 314 * GB and len(sizes) == 145
    order = arrange(steps, sizes)
    assert order.peak == pytest.approx(6.44 * GB, rel=0.01)
    assert held(order, sizes, order.budget) <= order.budget == HELD < 8 * GB


def test_fetching_and_converting_overlap_and_the_slower_one_decides() -> None:
    steps, sizes = real_table()
    order = arrange(steps, sizes)
    fetch, work = sum(sizes.values()) / 100e6, sum(step.weight for step in steps) / 1e9
    both = seconds(order, sizes, 100e6, 1e9)
    assert fetch < both < fetch + work
    assert seconds(order, sizes, 1e15, 1e9) == pytest.approx(work, rel=1e-3)
    assert seconds(order, sizes, 100e6, 1e15) == pytest.approx(fetch, rel=1e-3)


def test_shards_in_an_order_of_their_own_are_converted_in_that_order() -> None:
    """Layers sorted as text (0, 1, 10, 11, 2, ...), two to a shard, each running over into the
    next: in the order of numbers nearly all shards would wait for one another."""
    layers = sorted(range(40), key=str)
    needs = {n: frozenset({f"s{i // 2:02}", f"s{(i + 1) // 2:02}"}) for i, n in enumerate(layers)}
    sizes = {file: GB for files in needs.values() for file in files}
    order = arrange([Step(str(n), needs[n], 1) for n in range(40)], sizes)
    assert order.peak <= 3 * GB


STEPS = st.lists(
    st.frozensets(st.integers(0, 9).map(str), min_size=1, max_size=4), min_size=1, max_size=12
)


@given(STEPS, st.lists(st.integers(1, 100), min_size=10, max_size=10), st.integers(0, 300))
def test_any_order_ends_and_stays_in_its_budget(
    needs: list[frozenset[str]], numbers: list[int], more: int
) -> None:
    sizes = {str(i): n for i, n in enumerate(numbers)}
    steps = [Step(str(i), files, 5) for i, files in enumerate(needs)]
    order = arrange(steps, sizes)
    assert sorted(step.name for step in order.steps) == sorted(step.name for step in steps)
    assert set(order.files) == set().union(*needs)
    assert held(order, sizes, order.peak + more) <= order.peak + more
    both = seconds(order, sizes, 7.0, 3.0)
    fetch, work = sum(sizes[file] for file in order.files) / 7, len(steps) * 5 / 3
    assert max(fetch, work) - 1e-6 <= both <= fetch + work + 1e-6


def test_the_table_makes_the_files_of_the_real_models_pack() -> None:
    from quant.inventory import expected, expected_mtp, file_of

    path = Path(__file__).parents[1] / "mimo_local" / "real_config.json"
    config = json.loads(path.read_text())
    wanted = {file_of(name) for name in expected(config) | expected_mtp(config)}
    assert {f"{step.name}.safetensors" for step in real_table()[0]} == wanted


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=8)


@given(RANGES, st.integers(0, 50), st.integers(0, 50))
def test_ranges_are_sets_of_bytes(pairs: list[tuple[int, int]], start: int, stop: int) -> None:
    from mimo_local.pull.ranges import gaps, merged, noted, written

    ranges = [(a, a + n) for a, n in pairs]
    bytes_of = {i for a, b in ranges for i in range(a, b)}
    joined = merged(ranges)
    assert {i for a, b in joined for i in range(a, b)} == bytes_of
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(joined))
    missing = gaps(joined, start, stop)
    assert [i for a, b in missing for i in range(a, b)] == sorted(
        set(range(start, stop)) - bytes_of
    )
    text = written("file 50", joined)
    assert noted(text, "file 50", 50) == joined
    assert noted(text, "other 50", 50) == []
    assert noted(text + "7 ", "file 50", 50) == joined, "a torn line"
    assert noted(text + "7 9999\n", "file 50", 50) == joined, "beyond the file"
