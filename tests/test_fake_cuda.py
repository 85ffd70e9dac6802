"""The rules of tests/fake_cuda.py find what they are there for, and let right code pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from built import needs_compiler
from fake_cuda import FakeCuda, Hazard, HostWait, MixedDevices, fake_cuda

from mimo_local.device import Mark, Stream, host_buffer

CUDA = torch.device("cuda")
pytestmark = needs_compiler


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with torch.inference_mode(), fake_cuda() as cuda:
        yield cuda


# ---- devices -------------------------------------------------------------------------------------


def test_a_sum_of_host_and_device_is_refused(cuda: FakeCuda) -> None:
    with pytest.raises(MixedDevices, match=r"aten.add.*cuda \(2,\), cpu \(2,\)"):
        torch.ones(2, device=CUDA) + torch.ones(2)


def test_an_operator_of_bitsandbytes_with_a_weight_on_the_host_is_refused(cuda: FakeCuda) -> None:
    import bitsandbytes  # noqa: F401

    x = torch.ones((2, 64), dtype=torch.bfloat16, device=CUDA)
    codes, scales = torch.zeros((64 * 32, 1), dtype=torch.uint8), torch.ones(64)
    with pytest.raises(MixedDevices, match="gemm_4bit"):
        torch.ops.bitsandbytes.gemm_4bit(x, codes, [64, 64], scales, 64, "nf4")
    y = torch.ops.bitsandbytes.gemm_4bit(x, codes.to(CUDA), [64, 64], scales.to(CUDA), 64, "nf4")
    assert y.shape == (2, 64)
    assert y.device.type == "cuda"
    assert y.dtype == torch.bfloat16


def test_indices_have_to_be_where_the_tensor_is(cuda: FakeCuda) -> None:
    ids = torch.tensor([1, 0], device=CUDA)
    with pytest.raises(MixedDevices, match=r"aten\.index"):
        torch.ones(4)[ids]
    with pytest.raises(MixedDevices):
        torch.ones(4, device=CUDA)[torch.tensor([1])]
    with pytest.raises(MixedDevices):
        torch.cat([torch.ones(4, device=CUDA), torch.ones(4)])


def test_numbers_without_a_dimension_may_come_from_the_host(cuda: FakeCuda) -> None:
    assert (torch.ones(2, device=CUDA) * torch.tensor(2.0)).device.type == "cuda"


def test_every_way_to_the_device_and_back_is_one(cuda: FakeCuda) -> None:
    x, there = torch.ones(4), torch.ones(2, device=CUDA)
    for moved in (
        x.to(CUDA), x.to("cuda:0"), x.to(CUDA, torch.bfloat16), x.to(there),
        x.to(device=CUDA, dtype=torch.bfloat16), x.new_zeros(4, device=CUDA),
        torch.zeros_like(x, device=CUDA), torch.arange(4, device=CUDA),
        torch.as_tensor(x, device=CUDA),
    ):  # fmt: skip
        assert moved.device.type == "cuda"
        assert moved.shape == (4,)
        for back in (
            moved.cpu(),
            moved.to("cpu"),
            moved.to(x),
            moved.to(device="cpu", dtype=x.dtype),
        ):
            assert back.tolist() == [0, 1, 2, 3] or back.tolist() == [1 / 16] * 4
    assert cuda.count.h2d == 6
    assert cuda.count.d2h == 9 * 4


def test_host_tensors_are_real_meanwhile_and_afterwards(cuda: FakeCuda) -> None:
    assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
    assert torch.ones(2, 3).numpy().sum() == 6


def test_without_a_real_host_nothing_is_held() -> None:
    with fake_cuda(real_host=False) as huge:
        # A terabyte, in no memory at all.
        host = torch.empty((1 << 20, 1 << 20), dtype=torch.uint8, pin_memory=True)
        there = host.to(CUDA, non_blocking=True)
        assert huge.live == 1 << 40
        del there
        assert (huge.live, huge.peak, huge.count.h2d_bytes) == (0, 1 << 40, 1 << 40)


# ---- waits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["item", "if", "nonzero", "mask", "tolist", "cpu", "int"])
def test_asking_the_device_for_a_number_is_seen(cuda: FakeCuda, ask: str) -> None:
    x = torch.ones((2, 4), device=CUDA)
    with pytest.raises(HostWait), cuda.no_waits():
        match ask:
            case "item":
                x[0, 0].item()
            case "if":
                bool(x.sum() > 1)
            case "nonzero":
                x.nonzero()
            case "mask":
                x[x > 0]
            case "tolist":
                x.tolist()
            case "cpu":
                x.cpu()
            case _:
                x[: int(x.sum())]


def test_a_list_made_into_a_device_tensor_blocks(cuda: FakeCuda) -> None:
    torch.tensor([1, 2], device=CUDA)
    assert cuda.count.blocking == 1
    with pytest.raises(HostWait), cuda.no_waits():
        torch.tensor([1, 2], device=CUDA)


def test_copies_and_their_bytes_are_counted(cuda: FakeCuda) -> None:
    sent = host_buffer((4, 8), torch.float32, CUDA)
    with cuda.no_waits():
        here = sent.to(CUDA, non_blocking=True)
        back = host_buffer((4, 8), torch.bfloat16, CUDA)
        back.copy_(here, non_blocking=True)  # widths may change on the way
        done = Mark(CUDA)
        done.set()
        done.wait()
    count = cuda.count
    assert (count.h2d, count.h2d_bytes, count.d2h, count.waits) == (1, 128, 1, 1)
    assert (count.blocking, count.unpinned) == (0, 0)
    torch.ones(3).to(CUDA, non_blocking=True)
    assert count.unpinned == 1


def test_bytes_arrive_when_they_are_waited_for(cuda: FakeCuda) -> None:
    ids = torch.zeros((2, 3), dtype=torch.int64, device=CUDA)
    back = host_buffer((2, 3), torch.int64, CUDA)
    back.copy_(ids, non_blocking=True)
    done = Mark(CUDA)
    done.set()
    assert back[0].tolist()[0] > 1 << 60
    done.wait()
    assert back.tolist() == [[0, 1, 2], [0, 1, 2]]


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_counted_as_the_allocator_rounds_it(cuda: FakeCuda) -> None:
    a = torch.empty(100, device=CUDA)
    b = a.view(10, 10)[2:]
    assert cuda.live == 512
    c = torch.cat([a, a])
    assert (cuda.live, cuda.peak) == (512 + 1024, 1536)
    del a, c
    assert (cuda.live, cuda.peak) == (512, 1536)
    cuda.reset()
    del b
    assert (cuda.live, cuda.peak) == (0, 512)


# ---- order ---------------------------------------------------------------------------------------


def test_a_copy_on_another_stream_has_to_be_waited_for(cuda: FakeCuda) -> None:
    copies, slot = Stream(CUDA), torch.zeros((2, 8), device=CUDA)
    staging, arrived = host_buffer((8,), torch.float32, CUDA), Mark(CUDA)
    free = Mark(CUDA)
    free.set()
    with copies.use():
        free.hold(copies)
        slot[1].copy_(staging, non_blocking=True)
        arrived.set()
    slot[0] + 1  # other bytes of the same memory
    with pytest.raises(Hazard, match=r"reads bytes that aten\.copy_.*writes"):
        slot[1] + 1
    arrived.hold(Stream(CUDA, current=True))
    slot[1] + 1


def test_a_slot_still_read_is_not_overwritten(cuda: FakeCuda) -> None:
    copies, slot = Stream(CUDA), torch.zeros(8, device=CUDA)
    staging = host_buffer((8,), torch.float32, CUDA)
    used = Mark(CUDA)
    slot * 2
    used.set()
    with copies.use(), pytest.raises(Hazard, match="writes bytes that"):
        slot.copy_(staging, non_blocking=True)
    used.hold(copies)
    with copies.use():
        slot.copy_(staging, non_blocking=True)
    cuda.synchronize()


def test_staging_is_not_refilled_while_it_is_sent(cuda: FakeCuda) -> None:
    staging = host_buffer((8,), torch.float32, CUDA)
    staging.to(CUDA, non_blocking=True)
    sent = Mark(CUDA)
    sent.set()
    with pytest.raises(Hazard, match=r"\(host\) writes bytes that"):
        staging.copy_(torch.ones(8))
    sent.wait()
    staging.copy_(torch.ones(8))


def test_results_are_not_read_before_they_are_there(cuda: FakeCuda) -> None:
    back = host_buffer((8,), torch.float32, CUDA)
    back.copy_(torch.ones(8, device=CUDA), non_blocking=True)
    with pytest.raises(Hazard, match=r"\(host\) reads bytes"):
        back + 1


def test_memory_given_back_under_another_stream_is_told_at_the_end() -> None:
    with pytest.raises(Hazard, match="given back"), fake_cuda() as cuda:
        side, x = Stream(CUDA), torch.ones(8, device=CUDA)
        ready = Mark(CUDA)
        ready.set()
        ready.hold(side)
        with side.use():
            x + 1
        del x
        cuda.synchronize()


def test_the_process_is_as_before() -> None:
    with fake_cuda():
        torch.ones(2, device=CUDA)
    assert not torch.accelerator.is_available()
    assert torch.ones(2).sum().item() == 2
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        torch.ones(2, device=CUDA)
    assert isinstance(torch.Stream, type)
    x = torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad is not None
