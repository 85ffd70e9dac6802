"""Experts on the stand-in device, in a process of its own: python ... PACK CASE.

CASE "right" runs the code as it is; the others leave one wait out and must be caught. The last line
is one JSON object. Called by tests/test_sim_device.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim_device

from mimo_local import device
from mimo_local.experts import device_store, vram
from mimo_local.experts.device_store import DeviceStore
from mimo_local.experts.store import ExpertStore
from mimo_local.experts.tiered import TieredStore
from mimo_local.weights import PackWeights, open_weights


def step(seed: int, n_experts: int, k: int, d: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    t = 1 + seed % 4
    ids = torch.stack([torch.randperm(n_experts, generator=g)[:k].sort()[0] for _ in range(t)])
    return torch.randn(t, d, generator=g), ids.int(), torch.rand(t, k, generator=g)


def leave_out(case: str) -> None:
    """Break one thing."""
    if case == "no wait for arrival":
        device.Mark.hold = lambda self, stream: None  # type: ignore[method-assign]
    if case == "staging refilled too early":
        plain = vram._Staging.fill

        def fill(self: vram._Staging, *args: Any) -> None:
            self.sent = device.Mark(torch.device("cpu"))
            plain(self, *args)

        vram._Staging.fill = fill  # type: ignore[method-assign]
    if case == "choice read too early":
        device_store._Letter.read = early  # type: ignore[method-assign]
    if case == "results overwritten too early":
        plain_send = device_store._Return.send

        def send(self: device_store._Return, y: torch.Tensor) -> torch.Tensor:
            there = plain_send(self, y)
            assert self._rows is not None
            self._rows.fill_(7.0)  # what the layer after the next does, if nothing stops it
            return there

        device_store._Return.send = send  # type: ignore[method-assign]
    if case == "CPU and device mixed":
        vram.VramTier.run = lambda self, key, x: x + torch.ones(x.shape)  # type: ignore[method-assign]


def early(self: device_store._Letter) -> tuple[torch.Tensor, ...]:
    """As `read`, without the wait."""
    n = self._n
    return self._rows[:n], self._ids[:n].clamp(0, 7), self._weights[:n], None


def main(pack: str, case: str) -> None:
    sim = sim_device.load()
    opened = open_weights(pack)
    assert isinstance(opened, PackWeights)
    config, layer = opened.config, 1
    layouts = {s.index: opened.pack.expert_layout(s.index) for s in config.layers if s.mlp == "moe"}
    before = sim.counters().live
    tier = vram.VramTier(layouts, 6 * vram.VramTier(layouts, 0, "sim").slot_bytes, "sim")
    stride = layouts[layer].stride
    inner = TieredStore(opened, 40 * stride, reserve=0, prefetch="off")
    store = DeviceStore(inner, tier, "sim", list(layouts))
    whole = ExpertStore(opened)
    k, d = config.experts_per_token, config.hidden_size
    leave_out(case)
    # More uploads in a row than there are staging buffers, and nothing that waits for them.
    for e in range(vram.STAGING + 1):
        tier.touch((layer, e))
        assert tier.consider((layer, e), whole.ram.get(layer)[e])
        tier.end_of_step()
    worst, syncs = 0.0, []
    # NF4 by bitsandbytes' reference is a hundred small operations a product, 0.8 s a step there.
    for seed in range(60 if layouts[layer].format == "int8" else 15):
        x, ids, w = step(seed, config.n_experts, k, d)
        there = [part.to("sim") for part in (x, ids, w)]
        start = sim.counters().syncs
        y = store.run(layer, *there)
        syncs.append(sim.counters().syncs - start)
        found = y.cpu()
        wanted = whole.run(layer, x, ids, w)
        worst = max(worst, float(((found - wanted).norm() / wanted.norm()).nan_to_num(9.9)))
    counters = sim.counters()
    print(json.dumps({
        "worst": worst, "vram_hits": store.meters.vram_hits, "uploads": store.meters.uploads,
        "most_syncs": max(syncs), "unpinned": counters.unpinned, "h2d": counters.h2d,
        "bytes": counters.live - before, "planned": tier.nbytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
