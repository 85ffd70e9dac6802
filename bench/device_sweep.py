"""Long prompts through one layer's experts on a device: seconds measured, and what the bus allows.

One mixture layer of the real model's shapes with random weights in RAM (3.4 GB for 256 experts in
4 bits); rows choose experts at random. Each length is timed as the costs would split it, on the
device alone and on the CPU alone. Prints a line per length; the last line is one JSON object.
 Usage: python bench/device_sweep.py --device cuda [--rows 256,1024,4096] [--experts 256]
On a machine without an accelerator `--device cpu --experts 16 --rows 64,256` runs the same lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mimo_local import kernels, ops  # noqa: E402
from mimo_local.device import is_accelerator  # noqa: E402
from mimo_local.experts.device_sweep import DeviceSweep  # noqa: E402
from mimo_local.experts.shares import MOST_PAIRS, Costs, split  # noqa: E402
from mimo_local.experts.store import ExpertStore  # noqa: E402
from mimo_local.random_weights import RandomWeights, shape_config  # noqa: E402

LAYER = 1
DEVICE_ALONE = Costs(1e-9, 1e-9, 0.0, 0.0, 1.0, 1.0, 0.0)
CPU_ALONE = Costs(1.0, 1.0, 0.0, 0.0, 1e-9, 0.0, 1.0)


class Bench:
    """One layer, and a sweep over it."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = shape_config(2, 256)
        chosen = min(config.experts_per_token, options.experts)
        config = dataclasses.replace(config, n_experts=options.experts, experts_per_token=chosen)
        self.config, self.device = config, torch.device(options.device)
        weights = RandomWeights(config, experts=options.format)
        self.store = ExpertStore(weights)
        self.one = weights.expert_nbytes // config.n_experts
        self.sweep = DeviceSweep(
            self.store, None, self.device,
            n_experts=config.n_experts, hidden=config.hidden_size,
            width=config.moe_intermediate_size, nbytes=self.one,
        )  # fmt: skip
        self.guess = self.sweep.rates.guess

    def case(self, rows: int, seed: int) -> tuple[torch.Tensor, ...]:
        """x, ids, weights on the device."""
        g, config = torch.Generator().manual_seed(seed), self.config
        ids = torch.rand(rows, config.n_experts, generator=g).topk(config.experts_per_token).indices
        x = torch.randn(rows, config.hidden_size, generator=g)
        w = torch.rand(rows, config.experts_per_token, generator=g) / config.experts_per_token
        return x.to(self.device, self.sweep.dtype), ids.int().to(self.device), w.to(self.device)

    def seconds(self, case: tuple[torch.Tensor, ...]) -> float:
        """Until the device has the result."""
        self._wait()
        start = time.perf_counter()
        self.sweep.run(LAYER, *case)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if is_accelerator(self.device):
            torch.accelerator.synchronize(self.device)


def measure(bench: Bench, rows: int, rounds: int, bus: float) -> dict[str, Any]:
    """One length: medians of `rounds`, ways in turn."""
    case, rates = bench.case(rows, rows), bench.sweep.rates
    counts = torch.bincount(case[1].flatten().cpu(), minlength=bench.config.n_experts).tolist()
    chosen = {e: n for e, n in enumerate(counts) if n}
    took: dict[str, list[float]] = {"split": [], "device": [], "cpu": []}
    learnt = rates.device, rates.host
    # A CPU's share is bounded; all of a longer prompt is no way it could go.
    ways = [way for way in took if way != "cpu" or rows * case[1].shape[1] <= MOST_PAIRS]
    for turn in range(rounds + 2):  # the first two warm up, and tell the split the rates
        for way in ways:
            if way == "split":
                rates.guess, (rates.device, rates.host) = bench.guess, learnt
            else:
                rates.guess = DEVICE_ALONE if way == "device" else CPU_ALONE
                rates.device = rates.host = 1.0
            seconds = bench.seconds(case)
            if way == "split":
                learnt = rates.device, rates.host
            if turn > 1:
                took[way].append(seconds)
    rates.guess, (rates.device, rates.host) = bench.guess, learnt
    found = split(chosen, rates.costs)
    uploaded = len(found.device) * bench.one
    row: dict[str, Any] = {"rows": rows, "experts": len(chosen)}
    row |= {f"{way}_s": statistics.median(took[way]) for way in ways}
    row |= {"on_device": len(found.device), "on_cpu": len(found.host)}
    row |= {"device_factor": rates.device, "cpu_factor": rates.host}
    row |= {"planned_s": found.seconds, "bus_s": uploaded / bus}
    row["uploaded_gb_s"] = uploaded / row["split_s"] / 1e9
    return row


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", default="64,256,1024,4096,16384")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--format", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bus", type=float, default=25.0, help="GB/s of PCIe")
    options = parser.parse_args()
    bench = Bench(options)
    report: dict[str, Any] = {"device": options.device, "format": options.format}
    report |= {"kernels": kernels.describe(), "torch": torch.__version__}
    report |= {"expert_mb": bench.one / 1e6, "bus_gb_s": options.bus}
    report["device_mb"] = bench.sweep.nbytes / 1e6
    if options.device.startswith("cuda"):
        report["name"] = torch.cuda.get_device_name(torch.device(options.device))
    report["lengths"] = []
    with torch.inference_mode(), ops.threads_for(1):
        for rows in (int(n) for n in options.rows.split(",")):
            row = measure(bench, rows, options.rounds, options.bus * 1e9)
            report["lengths"].append(row)
            alone = f", CPU alone {row['cpu_s']:.3f} s" if "cpu_s" in row else ""
            print(
                f"{rows} rows: {row['split_s']:.3f} s with {row['on_device']} experts there and "
                f"{row['on_cpu']} here; device alone {row['device_s']:.3f} s{alone}; "
                f"the bus takes {row['bus_s']:.3f} s"
            )
    bench.sweep.close()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
