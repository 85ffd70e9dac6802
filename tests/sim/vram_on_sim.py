"""The expert tiers with VRAM on the stand-in device, in a process of its own: python ... PACK CASE.

CASE "right" runs the code as it is; the others leave one wait out and must be caught. The last line
is one JSON object. Called by tests/test_sim_device.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim_device

from mimo_local import device
from mimo_local.experts import vram
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

        def fill(self: vram._Staging, expert: object) -> None:
            self.sent = device.Mark(torch.device("cpu"))
            plain(self, expert)  # type: ignore[arg-type]

        vram._Staging.fill = fill  # type: ignore[method-assign]
    if case == "results read too early":
        collect = vram.Pending.collect

        def early(self: vram.Pending, out: torch.Tensor) -> None:
            collect(vram.Pending(self.order, self.back, device.Mark(torch.device("cpu")), ()), out)

        vram.Pending.collect = early  # type: ignore[method-assign]
    if case == "CPU and device mixed":
        vram.VramTier._mlp = lambda self, slot, x: x + torch.ones(x.shape)  # type: ignore[method-assign]


def main(pack: str, case: str) -> None:
    sim = sim_device.load()
    opened = open_weights(pack)
    assert isinstance(opened, PackWeights)
    config, layer = opened.config, 1
    layouts = {s.index: opened.pack.expert_layout(s.index) for s in config.layers if s.mlp == "moe"}
    before = sim.counters().live
    tier = vram.VramTier(layouts, 6 * vram.VramTier(layouts, 0, "sim").slot_bytes, "sim")
    stride = layouts[layer].stride
    store = TieredStore(opened, 40 * stride, reserve=0, prefetch="off", vram=tier)
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
        start = sim.counters().syncs
        found = store.run(layer, x, ids, w)
        syncs.append(sim.counters().syncs - start)
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
