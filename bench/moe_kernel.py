"""Time of one mixture layer's experts in the kernels, beside the rate at which this machine reads.

Random packed weights of the true shapes, other experts in every call: nothing is in a cache. Prints
a line per case and one JSON object. Not part of the product: `mimo bench` measures whole slices.
 Usage: python bench/moe_kernel.py [--format nf4] [--gb 2.2] [--threads N]
"""

from __future__ import annotations

import argparse
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

from mimo_local import kernels, limits  # noqa: E402
from quant.buffers import huge_empty  # noqa: E402
from quant.formats import get_format  # noqa: E402

D, WIDTH, K = 4096, 2048, 8
PROBE = 1 << 30  # bytes
_SCALE = {"nf4": 0.02, "mxfp4": 120, "int8": 2e-4}


def make(fmt: str, nbytes: float, d: int, width: int) -> tuple[Any, list[torch.Tensor], int]:
    """Experts of random codes -> (array of Mlp, what keeps them alive, bytes of one)."""
    form, keep = get_format(fmt), []
    shapes = (("gate", (width, d)), ("up", (width, d)), ("down", (d, width)))
    one = sum(form.nbytes(*shape) for _, shape in shapes)
    mlps = (kernels.Mlp * max(2 * K, int(nbytes // one)))()
    for e in range(len(mlps)):
        whole = huge_empty(one)
        keep.append(whole)
        for name, shape in shapes:
            parts = {}
            for part, (dtype, dims) in form.parts(*shape).items():
                n = dtype.itemsize * torch.Size(dims).numel()
                parts[part], whole = whole[:n].view(dtype).view(dims), whole[n:]
                if part == "scales":
                    parts[part].fill_(_SCALE[fmt])
                else:
                    parts[part].random_()
            setattr(mlps[e], name, form.matrix(parts))
    return mlps, keep, one


class Case:
    """One shape: T rows, K experts each, the same ones or different ones; others in every call."""

    def __init__(
        self, library: kernels.Kernels, mlps: Any, one: int, t: int, k: int, same: bool = False
    ) -> None:
        self.library, self.mlps, self.t, self.k, self.turn = library, mlps, t, k, 0
        self.d = mlps[0].gate.cols
        self.x, self.y = torch.randn(t, self.d), torch.empty(t, self.d)
        self.w = torch.rand(t, k)
        self.n = k if same else min(len(mlps), t * k)
        self.nbytes = one * self.n
        self.name = f"{t} rows x {k} {'the same' if same else 'different'}"

    def __call__(self) -> float:
        """Seconds of one call."""
        ids = torch.arange(self.t * self.k).remainder_(self.n).add_(self.turn)
        ids = ids.remainder_(len(self.mlps)).int().view(self.t, self.k)
        self.turn += self.n
        start = time.perf_counter()
        self.library.call(
            "moe", self.mlps, len(self.mlps), self.x.data_ptr(), self.d, self.t,
            ids.data_ptr(), self.w.data_ptr(), self.k, self.y.data_ptr(), self.d, 0,
        )  # fmt: skip
        return time.perf_counter() - start


def main() -> int:
    """Measure in turn, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", default="1,2,4,8")
    options = parser.parse_args()
    library = kernels.get()
    if library is None:
        raise SystemExit(kernels.why_unavailable())
    if options.threads:
        library.set_threads(options.threads)
    mlps, keep, one = make(options.format, options.gb * 1e9, D, WIDTH)
    tiny, alive, small = make(options.format, 0, 64, 64)
    empty = Case(library, tiny, small, 1, K)
    rows = [int(t) for t in options.rows.split(",")]
    cases = [Case(library, mlps, one, t, K, same) for same in (False, True) for t in rows]
    took: dict[str, list[float]] = {case.name: [] for case in cases}
    # Not the experts one by one: a read of 13 MB begins and ends, which costs it 8 %.
    memory = limits.Memory(PROBE)
    memory.choose(3)
    reads, calls = [], []
    for _ in range(options.rounds):
        reads.append(memory.sample() * 1e9)
        for case in cases:
            took[case.name].append(case())
        calls.append(min(empty() for _ in range(50)))
    del alive, keep
    limit = statistics.median(reads)
    report: dict[str, Any] = {"format": options.format, "isa": library.isa}
    report |= {"threads": library.threads, "limit_gb_s": limit / 1e9}
    report["empty_call_us"] = statistics.median(calls) * 1e6
    print(
        f"reads {limit / 1e9:.1f} GB/s; a call of 8 tiny experts {report['empty_call_us']:.1f} us"
    )
    for case in cases:
        seconds = statistics.median(took[case.name])
        shares = [case.nbytes / s / r for s, r in zip(took[case.name], reads, strict=True)]
        row = {"ms": seconds * 1e3, "gb_s": case.nbytes / seconds / 1e9}
        row["share_of_limit"] = statistics.median(shares)
        report[case.name] = row
        print(
            f"{case.name}: {row['ms']:.2f} ms, {row['gb_s']:.1f} GB/s, {row['share_of_limit']:.0%}"
        )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
