"""Prompts through experts under CUDA tensors that hold nothing: no hazard, no wait but for counts.

The host's half is real: stores, disk and kernels. tests/fake_cuda.py says what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from built import needs_compiler
from fake_cuda import FakeCuda, Hazard, fake_cuda

from mimo_local.device import Devices, Mark
from mimo_local.experts import device_sweep, upload
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.shares import Costs, Rates
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.tiered import TieredStore
from mimo_local.experts.vram import VramTier
from mimo_local.model import Model, Segment
from mimo_local.weights import PackWeights, open_weights
from quant.convert import Recipe, convert

CUDA = torch.device("cuda")
EXPERTS, K, D, LAYER = 16, 4, 64, 1
CONFIG: dict[str, Any] = tiny.config("fsfs", "dmmm", experts=EXPERTS, top_k=K, hidden=D)
DEVICE = Costs(1e-6, 1e-6, 0.0, 0.0, 1.0, 0.0, 0.0)
HOST = Costs(1.0, 1.0, 0.0, 0.0, 1e-6, 0.0, 0.0)
BOTH = Costs(1e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0)
SHARES = {"device": DEVICE, "host": HOST, "both": BOTH}
pytestmark = needs_compiler


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake-sweep")
    checkpoint = tiny.write(folder / "m", CONFIG)
    convert(checkpoint, folder / "pack", Recipe.for_format(str(request.param)))
    return folder / "pack"


def opened(pack: Path) -> PackWeights:
    found = open_weights(pack)
    assert isinstance(found, PackWeights)
    return found


class Bench:
    """A store, some experts in VRAM, and the sweep over both."""

    def __init__(self, pack: Path, costs: Costs, *, disk: bool) -> None:
        self.weights = opened(pack)
        layouts = {n: self.weights.pack.expert_layout(n) for n in self.weights.pack.expert_layers}
        stride = layouts[LAYER].stride
        self.inner: Store = (
            TieredStore(self.weights, 12 * stride, reserve=0, prefetch="off")
            if disk
            else ExpertStore(self.weights)
        )
        whole = ExpertStore(self.weights)
        self.vram = VramTier(layouts, 4 * VramTier(layouts, 0, CUDA).slot_bytes, CUDA)
        torch.accelerator.synchronize()
        for e in (2, 9):
            self.vram.touch((LAYER, e))
            assert self.vram.consider((LAYER, e), whole.ram.get(LAYER)[e])
            self.vram.end_of_step()
        self.sweep = DeviceSweep.of(self.inner, self.vram, CUDA, self.weights)
        self.sweep.rates.guess = costs

    def run(self, t: int = EXPERTS) -> torch.Tensor:
        """What comes down as counts is one row for each expert: T * K = EXPERTS pairs."""
        x = torch.empty((t // K, D), dtype=torch.bfloat16, device=CUDA)
        ids = torch.empty((t // K, K), dtype=torch.int32, device=CUDA)
        return self.sweep.run(LAYER, x, ids, torch.empty((t // K, K), device=CUDA))

    def close(self) -> None:
        self.sweep.close()
        self.vram.close()
        self.inner.close()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(Rates, "observe", lambda *_: None)  # who gets what is fixed here
    with torch.inference_mode(), fake_cuda() as cuda:
        yield cuda


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_a_layer_waits_for_the_counts_alone(
    pack: Path, cuda: FakeCuda, share: str, disk: bool
) -> None:
    bench = Bench(pack, SHARES[share], disk=disk)
    for _ in range(3):
        cuda.reset()
        with cuda.no_waits():
            out = bench.run()
        assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.float32, (4, D))
        assert (cuda.count.blocking, cuda.count.unpinned) == (0, 0)
        # The counts, the CPU's rows and results, and for an upload its buffer's last copy.
        uploads = {"device": EXPERTS - 2, "host": 0, "both": EXPERTS // 2}[share]
        assert cuda.count.waits <= 3 + uploads + 1
        assert cuda.count.d2h == (1 if share == "device" else 2)
    bench.close()


@pytest.mark.parametrize("left_out", ["arrived", "used"])
def test_a_missing_wait_is_seen(
    pack: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """Also that a slot is not overwritten before the device has used what is in it."""
    bench = Bench(pack, DEVICE, disk=False)
    bench.run()
    plain = Mark.hold

    def hold(self: Mark, stream: Any) -> None:
        if not any(self is getattr(slot, left_out) for slot in bench.sweep.uploader._slots):
            plain(self, stream)

    with monkeypatch.context() as patch, pytest.raises(Hazard):
        patch.setattr(Mark, "hold", hold)
        bench.run()
    bench.close()


def test_a_buffer_is_not_filled_before_its_copy_is_over(
    pack: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are written past torch: here by torch, so that it is seen."""
    plain = upload.Uploader.send

    def send(self: upload.Uploader, slot: upload.Slot) -> None:
        slot.host.add_(0)
        plain(self, slot)

    monkeypatch.setattr(upload.Uploader, "send", send)
    bench = Bench(pack, DEVICE, disk=False)
    bench.run()  # with its wait: nothing
    never = Mark(torch.device("cpu"))
    for slot in bench.sweep.uploader._slots:
        slot.arrived.wait = never.wait  # type: ignore[method-assign]
    with pytest.raises(Hazard):
        bench.run()
    for slot in bench.sweep.uploader._slots:
        del slot.arrived.wait
    bench.close()


def test_a_prompt_is_read_layer_by_layer(
    pack: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sweep, "ROWS", 100)
    bench = Bench(pack, BOTH, disk=True)
    experts = DeviceStore(bench.inner, bench.vram, CUDA, [1, 2, 3], bench.sweep)
    model = Model(bench.weights, experts, devices=Devices.all_on(CUDA, 4))
    cache = model.new_cache(dtype=torch.bfloat16)
    model.prefill(Segment(torch.arange(700) % CONFIG["vocab_size"], cache))
    cuda.reset()
    hidden = model.prefill(Segment(torch.arange(700) % CONFIG["vocab_size"], cache))
    assert (hidden.device.type, hidden.shape) == ("cuda", (1, D))
    # Two layers are swept: per layer the counts, the CPU's rows and results, and its uploads.
    assert cuda.count.waits <= 2 * (3 + EXPERTS) + 4
    assert cuda.count.blocking == 0 and cuda.count.unpinned == 0
    experts.close()
