"""The split of experts between device and CPU: complete, never worse, right at the ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_local.experts.shares import ENOUGH_S, MOST_PAIRS, Costs, Rates, Split, split

REAL = Costs.guess(14_155_776, 3 * 4096 * 2048, isa="avx512", cores=8)
seconds = st.floats(1e-6, 1e-2)
costs = st.builds(Costs, *[seconds] * 7)
rows = st.dictionaries(st.integers(0, 255), st.integers(0, 2000), max_size=40)


def alone(counts: dict[int, int], c: Costs, there: set[int]) -> tuple[float, float]:
    """Seconds of the device by itself, and of the CPU."""
    wanted = [e for e, n in counts.items() if n]
    device = sum(c.device(counts[e], there=e in there) for e in wanted)
    return device + (c.start if wanted else 0.0), sum(c.host(counts[e]) for e in wanted)


@given(rows, costs, st.sets(st.integers(0, 255), max_size=20), st.integers(0, 3000))
def test_everything_is_done_once_and_never_later_than_by_one_side(
    counts: dict[int, int], c: Costs, there: set[int], most: int
) -> None:
    found = split(counts, c, there, most_pairs=most)
    assert sorted(found.device + found.host) == sorted(e for e, n in counts.items() if n)
    assert found.device == sorted(found.device) and found.host == sorted(found.host)
    assert sum(counts[e] for e in found.host) <= most
    device, host = alone(counts, c, there)
    assert found.seconds <= device * (1 + 1e-9)
    if sum(counts.values()) <= most:
        assert found.seconds <= host * (1 + 1e-9)
    # What it says of both sides is what the costs say of who got what.
    assert found.device_s == pytest.approx(alone({e: counts[e] for e in found.device}, c, there)[0])
    assert found.host_s == pytest.approx(alone({e: counts[e] for e in found.host}, c, set())[1])


@given(rows, costs)
def test_one_side_gets_everything_where_both_cannot(counts: dict[int, int], c: Costs) -> None:
    found = split(counts, c, both=False)
    device, host = alone(counts, c, set())
    assert not (found.device and found.host)
    assert found.seconds <= min(device, host if sum(counts.values()) <= MOST_PAIRS else device) * (
        1 + 1e-9
    )


@given(rows, costs)
def test_the_same_numbers_are_split_the_same_way(counts: dict[int, int], c: Costs) -> None:
    back = dict(reversed(list(counts.items())))
    assert split(counts, c) == split(back, c)


def test_a_few_rows_stay_with_the_cpu_and_a_long_prompt_goes_to_the_device() -> None:
    """The real model's 256 experts, 8 cores, PCIe 4."""
    assert split(dict.fromkeys(range(4), 1), REAL).device == []
    few = split(dict.fromkeys(range(200), 2), REAL)
    assert len(few.host) > len(few.device) > 0
    many = split(dict.fromkeys(range(256), 128), REAL)  # 4096 rows
    assert len(many.device) > 200
    assert split(dict.fromkeys(range(256), MOST_PAIRS + 1), REAL).host == []


def test_the_cpu_gets_experts_of_few_rows_and_rather_those_that_are_not_there_yet() -> None:
    counts = {e: 9 + e for e in range(64)}
    found = split(counts, REAL, there=range(0, 64, 2))
    uploads = [e for e in found.host if e % 2]
    assert uploads == list(range(1, 2 * len(uploads), 2))  # those with the fewest rows
    assert len(uploads) > 2 * (len(found.host) - len(uploads))


def test_nobody_chosen_is_nothing_to_do() -> None:
    assert split({}, REAL) == split({3: 0}, REAL) == Split([], [], 0.0, 0.0)


def test_a_slower_side_gets_less_and_is_tried_again() -> None:
    counts = dict.fromkeys(range(256), 60)
    rates = Rates(REAL)
    first = split(counts, rates.costs)
    for _ in range(30):
        found = split(counts, rates.costs)
        rates.observe(found, 3 * _device_s(found, counts), _host_s(found, counts))
    slower = split(counts, rates.costs)
    assert len(slower.device) < len(first.device)
    assert rates.device == pytest.approx(3, rel=0.1) and rates.host == pytest.approx(1, rel=0.1)
    for _ in range(300):
        rates.observe(split({}, rates.costs), None, None)
    assert len(split(counts, rates.costs).device) == pytest.approx(len(first.device), abs=1)


@pytest.mark.parametrize("times", [0.01, 0.3, 4.0, 300.0])
def test_rates_of_another_machine_are_found_out_in_a_few_layers(times: float) -> None:
    counts, rates = dict.fromkeys(range(256), 60), Rates(REAL)
    for _ in range(4):  # the first is left out, two have to agree
        found = split(counts, rates.costs)
        rates.observe(found, times * _device_s(found, counts), _host_s(found, counts))
    assert rates.device == pytest.approx(times, rel=0.25)


@given(st.floats(0.97, 1.03), st.floats(0.97, 1.03))
def test_a_trifle_changes_nobodys_share(device: float, host: float) -> None:
    counts = {e: 20 + 7 * e % 90 for e in range(256)}
    assert split(counts, Rates(REAL, device, host).costs) == split(counts, REAL)


def test_a_pause_of_the_system_does_not_turn_everything_over() -> None:
    counts = dict.fromkeys(range(256), 60)
    rates = Rates(REAL)
    for _ in range(2):
        found = split(counts, rates.costs)
        assert found.device_s > ENOUGH_S
        rates.observe(found, 1000.0, None)
    assert rates.device < 2  # the first one is left out, libraries load then


def _device_s(found: Split, counts: dict[int, int]) -> float:
    return alone({e: counts[e] for e in found.device}, REAL, set())[0]


def _host_s(found: Split, counts: dict[int, int]) -> float:
    return alone({e: counts[e] for e in found.host}, REAL, set())[1]
