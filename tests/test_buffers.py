"""buffers: alignment, huge pages where the system has them, memory that goes when let go."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch

from quant import buffers
from quant.buffers import HUGE, PAGE, huge_empty, huge_tensor

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(address: int) -> int:
    """Bytes of huge pages of the mapping that holds this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 123])
def test_a_buffer_is_aligned_and_can_be_written_to_its_end(nbytes: int) -> None:
    buffer = huge_empty(nbytes)
    assert buffer.dtype == torch.uint8 and buffer.shape == (nbytes,)
    if nbytes:
        assert buffer.data_ptr() % (HUGE if nbytes >= HUGE else PAGE) == 0
    buffer.fill_(7)
    assert int(buffer.sum(dtype=torch.int64)) == 7 * nbytes


def test_large_buffers_are_on_huge_pages() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this system gives no huge pages")
    buffer = huge_empty(16 * HUGE + 5000)
    buffer.fill_(1)
    found = huge_bytes(buffer.data_ptr())
    if not found:
        pytest.skip("no huge page was free")
    assert found <= 16 * HUGE


def test_memory_goes_with_the_last_view() -> None:
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    buffer = huge_empty(64 << 20)
    buffer.fill_(1)
    part = buffer[1 << 20 : 2 << 20].view(torch.float32)
    del buffer
    assert process.memory_info().rss > before + (60 << 20)
    assert float(part[0]) != 0.0
    del part
    gc.collect()
    assert process.memory_info().rss < before + (16 << 20)


def test_tensors_have_the_shape_that_was_asked() -> None:
    for shape in ((), (3, 5), (2048, 2048)):
        made = huge_tensor(shape, torch.float16)
        assert made.shape == shape and made.dtype == torch.float16 and made.is_contiguous()
    assert made.data_ptr() % HUGE == 0


def test_without_huge_pages_there_is_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_ADVICE", None)
    buffer = huge_empty(2 * HUGE)
    assert buffer.shape == (2 * HUGE,) and buffer.data_ptr() % PAGE == 0
    monkeypatch.setattr(buffers, "_ADVICE", 12345)  # no such advice: EINVAL
    buffer = huge_empty(2 * HUGE)
    assert buffer.data_ptr() % HUGE == 0


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of memory for weights"):
        huge_empty(1 << 60)
