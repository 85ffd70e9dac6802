"""limits: bytes over seconds and operations over seconds, with the library and without."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest

from mimo_local import hardware, kernels, limits
from mimo_local.errors import NativeError

SMALL = 8 << 20


@pytest.fixture
def native() -> kernels.Kernels:
    found = kernels.get()
    if found is None:
        pytest.skip(kernels.why_unavailable())
    return found


class Counting:
    """The library, writing down what it is asked."""

    def __init__(self, native: kernels.Kernels) -> None:
        self.native, self.calls = native, list[tuple[int, int, int]]()

    def call(self, name: str, start: int, nbytes: int, streams: int, seconds: object) -> None:
        assert name == "read_limit"
        self.calls.append((start, nbytes, streams))
        self.native.call(name, start, nbytes, streams, seconds)


def test_samples_walk_through_the_memory(native: kernels.Kernels) -> None:
    memory = limits.Memory(SMALL)
    memory._native = counting = Counting(native)  # type: ignore[assignment]
    rates = [memory.sample() for _ in range(5)]
    starts = [start - counting.calls[0][0] for start, _, _ in counting.calls]
    assert starts == [0, SMALL // 4, SMALL // 2, SMALL * 3 // 4, 0]
    assert {nbytes for _, nbytes, _ in counting.calls} == {SMALL // 4}
    assert memory.samples == rates
    assert all(0.01 < rate < 10_000 for rate in rates)


def test_the_best_number_of_streams_is_used_from_then_on(native: kernels.Kernels) -> None:
    memory = limits.Memory(SMALL)
    memory._native = counting = Counting(native)  # type: ignore[assignment]
    medians = memory.choose(3)
    assert sorted(medians) == [1, 4, 8, 16]
    assert memory.streams == max(medians, key=lambda n: medians[n])
    assert len(memory.samples) == 3
    memory.sample()
    assert counting.calls[-1][2] == memory.streams
    assert len(counting.calls) == 13


def test_reading_costs_the_time_the_clock_shows(native: kernels.Kernels) -> None:
    memory = limits.Memory(SMALL)
    start = time.perf_counter()
    slowest = min(memory.sample() for _ in range(4))
    passed = time.perf_counter() - start
    assert SMALL / 4 / (slowest * 1e9) <= passed, "one section cannot take longer than all"


def test_wrong_streams_are_an_error(native: kernels.Kernels) -> None:
    data, seconds = ctypes.create_string_buffer(2048), ctypes.c_double()
    with pytest.raises(NativeError, match="read_limit"):
        native.call("read_limit", ctypes.addressof(data), 1024, 3, ctypes.byref(seconds))


def test_products_grow_no_faster_than_a_processor_can(native: kernels.Kernels) -> None:
    assert 1e-5 < limits.products(5) < 1000


def test_without_the_library_there_are_figures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)
    memory = limits.Memory(SMALL)
    assert 0.01 < memory.sample() < 10_000
    assert 1e-5 < limits.products(5) < 1000


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    rate, note = limits.disk(tmp_path / "new" / "folder", 0.05)
    assert rate is not None and rate > 0
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("no folder")
    rate, note = limits.disk(tmp_path / "file", 0.05)
    assert rate is None
    assert note.startswith("not measured: ")


def test_a_machine_too_busy_to_start_threads_in_time_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def measure(seconds: float) -> hardware.Speed:
        asked.append(seconds)
        return hardware.Speed(0.0 if len(asked) < 3 else 5e9)

    monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr(hardware, "measure_ram", measure)
    assert limits.Memory(SMALL).sample() == 5.0
    assert asked == sorted(set(asked)) and len(asked) == 3
