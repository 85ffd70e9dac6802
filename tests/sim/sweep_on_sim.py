"""A prompt's experts on the stand-in device, in a process of its own: python ... PACK CASE.

CASE "right" runs the code as it is; the others leave one wait out and must be caught. The last line
is one JSON object. Called by tests/test_sim_device.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim_device

from mimo_local import device
from mimo_local.experts import device_sweep, host_share, vram
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.shares import Costs, Rates
from mimo_local.experts.store import ExpertStore, Store
from mimo_local.experts.tiered import TieredStore
from mimo_local.weights import PackWeights, open_weights

LAYER, ROWS = 1, 40
DEVICE = Costs(1e-6, 1e-6, 0.0, 0.0, 1.0, 0.0, 0.0)
BOTH = Costs(1e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0)
HOST = Costs(1.0, 1.0, 0.0, 0.0, 1e-6, 0.0, 0.0)


def step(seed: int, n_experts: int, k: int, d: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    t = 1 if seed == 0 else 60 + seed
    ids = torch.stack([torch.randperm(n_experts, generator=g)[:k].sort()[0] for _ in range(t)])
    return torch.randn(t, d, generator=g), ids.int(), torch.rand(t, k, generator=g)


def without(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`call` with a mark that nobody set in the place of its own."""

    def broken(self: Any, *args: Any) -> Any:
        own = getattr(self, name)
        setattr(self, name, device.Mark(torch.device("cpu")))
        try:
            return call(self, *args)
        finally:
            setattr(self, name, own)

    return broken


def leave_out(case: str) -> None:
    """Break one thing."""
    if case == "no wait for arrival":
        device.Mark.hold = lambda self, stream: None  # type: ignore[method-assign]
    if case == "counts read too early":
        device_sweep.Mark = _Never  # type: ignore[misc, assignment]
    if case == "rows read too early":
        share = host_share.HostShare
        share._multiply = without(share._multiply, "_arrived")  # type: ignore[method-assign]
    if case == "CPU and device mixed":
        plain = DeviceSweep.mlp
        DeviceSweep.mlp = lambda self, slot, expert: (  # type: ignore[method-assign]
            lambda x: plain(self, slot, expert)(x) + torch.ones(x.shape)
        )


class _Never(device.Mark):
    """A mark nobody waits for."""

    def wait(self) -> None:
        pass


def stores(opened: PackWeights, whole: ExpertStore) -> dict[str, Store]:
    stride = opened.pack.expert_layout(LAYER).stride
    ring = 2 * opened.config.experts_per_token
    few = TieredStore(opened, (ring + 2) * stride, reserve=0, prefetch="off")
    return {"ram": whole, "disk": few}


def main(pack: str, case: str) -> None:
    sim = sim_device.load()
    opened = open_weights(pack)
    assert isinstance(opened, PackWeights)
    config, whole = opened.config, ExpertStore(opened)
    k, d, n = config.experts_per_token, config.hidden_size, config.n_experts
    layout = opened.pack.expert_layout(LAYER)
    tier = vram.VramTier({LAYER: layout}, 2 * layout.nbytes * 2, "sim")
    for e in (1, 4):
        tier.touch((LAYER, e))
        assert tier.consider((LAYER, e), whole.ram.get(LAYER)[e])
        tier.end_of_step()
    device_sweep.ROWS = ROWS  # type: ignore[misc]
    Rates.observe = lambda *_: None  # type: ignore[method-assign]
    leave_out(case)
    worst, over, waits, uploads = 0.0, 0, [], []
    quick = layout.format == "int8"
    for name, store in stores(opened, whole).items():
        if name == "ram" and not quick:
            continue
        for costs in (DEVICE, BOTH, HOST) if quick else (BOTH,):
            before = sim.counters().live
            sweep = DeviceSweep(
                store, tier if name == "disk" else None, "sim", n_experts=n, hidden=d,
                width=config.moe_intermediate_size, nbytes=layout.nbytes, costs=costs,
            )  # fmt: skip
            for seed in range(3) if quick else (1,):
                x, ids, w = step(seed, n, k, d)
                there = [t.to("sim") for t in (x, ids, w)]
                settled = sim.counters()
                found = sweep.run(LAYER, *there)
                waits.append(sim.counters().syncs - settled.syncs)
                uploads.append(len(set(ids.flatten().tolist())))
                if costs is DEVICE and name == "ram":  # nothing that took more came before
                    mine = 40 * ids.numel() + 8 * x.numel()  # sorted pairs; x and the result
                    over = max(over, sim.counters().peak - before - sweep.nbytes - mine)
                wanted = whole.sweep(LAYER, x, ids, w)
                error = (found.cpu() - wanted).norm() / wanted.norm()
                worst = max(worst, float(error.nan_to_num(9.9)))
                del found, there
            sweep.close()
        store.close()
    print(json.dumps({
        "worst": worst, "waits": waits, "uploads": uploads, "over": over,
        "unpinned": sim.counters().unpinned,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
