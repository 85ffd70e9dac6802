"""How fast matrices are packed and unpacked: mimo_quantize and mimo_dequantize outside any cache.

Normal weights of an expert's shape, 2048 x 4096, the next matrix in every call. Every figure stands
beside the rate of reading memory measured right before and after it. Knows the kernels only. Run by
hand; the last line of the output is one JSON object:

    python bench/quantize_kernel.py --tables avx2 avx_vnni avx512 --threads 1 2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import time
from dataclasses import dataclass

import torch

from mimo_local import kernels

ROWS, COLS = 2048, 4096
WEIGHTS = ROWS * COLS
FORMATS = {"nf4": kernels.NF4, "mxfp4": kernels.MXFP4, "int8": kernels.INT8}
STORED = {"nf4": WEIGHTS * 17 // 32, "mxfp4": WEIGHTS * 17 // 32, "int8": WEIGHTS + ROWS * 4}
"""Bytes of a packed matrix, codes and scales."""
CODES = {"nf4": WEIGHTS // 2, "mxfp4": WEIGHTS // 2, "int8": WEIGHTS}
STREAMS = 16
WORK = ("plain", "search", "unpack")


def huge(nbytes: int) -> torch.Tensor:
    """Bytes on huge pages where the system gives them: the caches are measured, not page tables."""
    area = mmap.mmap(-1, -(-nbytes // (2 << 20)) * (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)[:nbytes].zero_()


class Matrices:
    """`count` matrices in float32, and room for each packed and for each unpacked again."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.floats = huge(count * WEIGHTS * 4)
        one = self.floats[: WEIGHTS * 4].view(torch.float32)
        torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0), out=one)
        one.mul_(0.02)
        for i in range(1, count):  # the same numbers at other addresses, elsewhere in their rows
            other = self.floats[i * WEIGHTS * 4 :][: WEIGHTS * 4]
            other.view(torch.float32).copy_(one.roll(64 * i))
        self.packed = huge(count * (WEIGHTS + (64 << 10)))
        self.back = huge(count * WEIGHTS * 4)

    def stored(self, name: str, i: int) -> kernels.Matrix:
        """Where matrix i is packed."""
        at = self.packed.data_ptr() + i * (WEIGHTS + (64 << 10))
        return kernels.Matrix(at, at + CODES[name], ROWS, COLS, FORMATS[name])


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to do with one format by one table."""

    library: kernels.Kernels
    name: str
    work: str

    @property
    def nbytes(self) -> int:
        """Bytes read and written for one matrix; a search reads what is in the cache."""
        return WEIGHTS * 4 + STORED[self.name]

    def seconds(self, matrices: Matrices) -> float:
        """One pass over all matrices."""
        start = time.perf_counter()
        for i in range(matrices.count):
            stored = matrices.stored(self.name, i)
            if self.work == "unpack":
                self.library.dequantize(stored, matrices.back.data_ptr() + i * WEIGHTS * 4)
                continue
            w = matrices.floats.data_ptr() + i * WEIGHTS * 4
            out = stored.codes, stored.scales
            self.library.quantize(FORMATS[self.name], w, ROWS, COLS, *out, self.work == "search")
        return time.perf_counter() - start


def read_rate(library: kernels.Kernels, matrices: Matrices) -> float:
    """GB/s of reading the matrices in interleaved streams with prefetch."""
    took, n = ctypes.c_double(), matrices.floats.numel()
    library.call("read_limit", matrices.floats.data_ptr(), n, STREAMS, ctypes.byref(took))
    return n / took.value / 1e9


def measure(case: Case, matrices: Matrices, repeat: int) -> dict[str, object]:
    """Median rate and median share of the read rate around each pass."""
    rates, shares, limits = [], [], []
    for _ in range(repeat):
        before = read_rate(case.library, matrices)
        seconds = case.seconds(matrices)
        limit = (before + read_rate(case.library, matrices)) / 2
        rates.append(matrices.count * WEIGHTS / seconds / 1e9)
        shares.append(matrices.count * case.nbytes / seconds / 1e9 / limit)
        limits.append(limit)
    return {
        "table": case.library.isa,
        "threads": case.library.threads,
        "format": case.name,
        "work": case.work,
        "g_weights_s": round(statistics.median(rates), 3),
        "share_of_limit": round(statistics.median(shares), 3),
        "limit_gb_s": round(statistics.median(limits), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", help="default: the best one")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--matrices", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    library = kernels.get()
    if library is None:
        raise SystemExit(kernels.why_unavailable())
    matrices = Matrices(options.matrices)
    results = []
    for table in options.tables or [library.isa]:
        bound = library.with_isa(table)
        for threads in options.threads:
            library.set_threads(threads)
            for name in options.formats:
                Case(bound, name, "plain").seconds(matrices)  # something to unpack
                for work in options.work:
                    results.append(measure(Case(bound, name, work), matrices, options.repeat))
                    print(" ".join(f"{value}" for value in results[-1].values()), flush=True)
    print(json.dumps({"shape": [ROWS, COLS], "streams": STREAMS, "quantize": results}))


if __name__ == "__main__":
    main()
