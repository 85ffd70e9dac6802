"""How fast few rows are multiplied: mimo_matmul over an expert's matrices that are in no cache.

Every figure is a ratio to the stream-read rate measured right before and after it, because the
machine's own rate changes from minute to minute. Knows the kernels only, no model. Run by hand:

    python bench/decode_kernel.py --threads 1 2 --rows 1 2 3 4 8 --formats nf4 mxfp4 int8 bf16

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mimo_local import kernels  # noqa: E402
from quant.buffers import huge_empty  # noqa: E402

SHAPES = ((2048, 4096), (2048, 4096), (4096, 2048))
"""Rows and columns of an expert's gate, up and down matrices."""
FORMATS = {
    "nf4": kernels.NF4,
    "mxfp4": kernels.MXFP4,
    "int8": kernels.INT8,
    "bf16": kernels.BF16,
    "f32": kernels.F32,
}
CODE_BITS = {"nf4": 4, "mxfp4": 4, "int8": 8, "bf16": 16, "f32": 32}
STREAMS = (1, 4, 8, 16)


def scale_bytes(name: str, rows: int, cols: int) -> int:
    """Bytes of a matrix's scales."""
    return {"nf4": rows * cols // 32, "mxfp4": rows * cols // 32, "int8": rows * 4}.get(name, 0)


class Memory:
    """Bytes in huge pages, random in the first part, scales of about a hundredth in the second."""

    def __init__(self, n: int) -> None:
        self.bytes = huge_empty(n)
        # Bit 6 clear: as BF16 or float32 every number is finite.
        self.bytes.random_(0, 256).bitwise_and_(0xBF)

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.bytes.data_ptr()


def scales_for(name: str, count: int) -> torch.Tensor:
    """Memory for `count` bytes of scales of a format."""
    if name == "mxfp4":
        return torch.full((count,), 120, dtype=torch.uint8)
    if name == "nf4":
        return torch.full((count // 2,), 0.01, dtype=torch.float16)
    return torch.full((max(count // 4, 1),), 0.01)


def matrices(name: str, memory: Memory, scales: torch.Tensor) -> list[kernels.Matrix]:
    """As many distinct matrices as the memory holds, in the order of an expert."""
    found: list[kernels.Matrix] = []
    at, scale_at = 0, 0
    while True:
        rows, cols = SHAPES[len(found) % len(SHAPES)]
        size = rows * cols * CODE_BITS[name] // 8
        if at + size > memory.bytes.numel():
            return found
        where = scales.data_ptr() + scale_at
        found.append(kernels.Matrix(memory.address + at, where, rows, cols, FORMATS[name]))
        at += size
        scale_at += scale_bytes(name, rows, cols)


def seconds_of(library: kernels.Kernels, weights: list[kernels.Matrix], rows: int) -> float:
    """One pass over all matrices."""
    x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0))
    y = torch.empty(rows, 4096)
    start = time.perf_counter()
    for w in weights:
        library.matmul(w, x.data_ptr(), 4096, rows, y.data_ptr(), 4096)
    return time.perf_counter() - start


def read_rate(library: kernels.Kernels, memory: Memory) -> float:
    """GB/s of reading the memory, a quarter with each number of streams; the best."""
    seconds, best = ctypes.c_double(), 0.0
    part = memory.bytes.numel() // len(STREAMS) // 1024 * 1024
    for i, streams in enumerate(STREAMS):
        start = memory.address + i * part
        library.call("read_limit", start, part, streams, ctypes.byref(seconds))
        best = max(best, part / seconds.value / 1e9)
    return best


def measure(options: argparse.Namespace, library: kernels.Kernels) -> list[dict[str, object]]:
    """Each format, number of rows and threads `repeat` times, beside the read rate each time."""
    memory = Memory(int(options.gigabytes * 512) << 21)  # whole huge pages
    results = []
    for name in options.formats:
        most = sum(scale_bytes(name, *shape) for shape in SHAPES)
        share = sum(r * c for r, c in SHAPES) * CODE_BITS[name] // 8
        scales = scales_for(name, (memory.bytes.numel() // share + 1) * most)
        weights = matrices(name, memory, scales)
        total = sum(
            w.rows * w.cols * CODE_BITS[name] // 8 + scale_bytes(name, w.rows, w.cols)
            for w in weights
        )
        for threads in options.threads:
            library.set_threads(threads)
            found: dict[int, list[tuple[float, float]]] = {rows: [] for rows in options.rows}
            for _ in range(options.repeat):
                for rows in options.rows:
                    before = read_rate(library, memory)
                    rate = total / seconds_of(library, weights, rows) / 1e9
                    limit = (before + read_rate(library, memory)) / 2
                    found[rows].append((rate, rate / limit))
            for rows, pairs in found.items():
                result = {
                    "format": name,
                    "threads": threads,
                    "rows": rows,
                    "gb_s": round(statistics.median(rate for rate, _ in pairs), 2),
                    "best_gb_s": round(max(rate for rate, _ in pairs), 2),
                    "share_of_limit": round(statistics.median(share for _, share in pairs), 3),
                }
                results.append(result)
                print(result, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nf4", "mxfp4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    library = kernels.get()
    if library is None:
        raise SystemExit(kernels.why_unavailable())
    results = measure(options, library)
    print(json.dumps({"isa": library.isa, "streams": STREAMS, "decode": results}))


if __name__ == "__main__":
    main()
